def build_info() -> dict[str, str | list[str] | None]:
    """How the compiled extension was built: compiler, instruction sets, CUDA and its architectures, kernels."""

def limit_cpu_level(level: int) -> int: ...
