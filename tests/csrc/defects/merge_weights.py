SOURCE = "kernels/merge_weights.cu"
DEFECTS = [
    ("float32 results from one product", SOURCE, "entry.out_format == gpu::Format::kBfloat16",
     "entry.out_format == gpu::Format::kFloat32"),
    ("a half of TF32's gap added", "kernels/primitives/convert.cuh", "(bits_of(x) + 0x1000u) & 0xffffe000u",
     "bits_of(x) & 0xffffe000u"),
    ("scale forgotten", SOURCE, "entry.scale * value", "value"),
    ("origin forgotten", SOURCE, "origin == nullptr", "true"),
    ("origin added", SOURCE,
     "gpu::load<T>(this->data, this->format, at) - gpu::load<T>(origin, origin_format, at)",
     "gpu::load<T>(this->data, this->format, at) + gpu::load<T>(origin, origin_format, at)"),
    ("origin in the format of B", SOURCE, "gpu::load<T>(origin, origin_format, at)",
     "gpu::load<T>(origin, this->format, at)"),
    ("rows of B after the last", SOURCE, "row < this->lines", "true"),
    ("columns of B after the last", SOURCE, "column < end", "true"),
    ("columns of A not dealt out", SOURCE, "line / 2 % 4 * 4 + line / 8 % 2 * 2 + line % 2", "line % 16"),
    ("rows of W taken as dense", SOURCE, "(row + 8 * i) * entry.pitch", "(row + 8 * i) * entry.cols"),
    ("a stage too few", SOURCE, "steps < kStages ? steps : kStages", "steps < 2 ? steps : 2"),
    ("W taken as aligned", SOURCE, "gpu::aligned16(w)", "true"),
    ("rows of W taken as aligned", SOURCE, "entry.pitch * sizeof(S) % 16 == 0", "true"),
    ("out taken as aligned", SOURCE, "gpu::aligned16(out)", "true"),
    ("rows of out taken as aligned", SOURCE, "entry.cols % 4 == 0", "true"),
    ("another format taken as T", "kernels/any_matrix.cuh", "format == kFormatOf<T>", "true"),
]  # fmt: skip

REPRESENTATIVES = {
    "plain": ("kernels/merge_weights.cu", "entry.scale * value -> value"),
    "sanitized": ("kernels/merge_weights.cu", "row + 8 * i < entry.rows -> true"),
    "raced": ("kernels/product.cuh", "__syncthreads() -> nothing"),
}
