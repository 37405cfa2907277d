"""Run folders that tests make by hand, with names of tasks that are not easy to print."""

from keeplora._files import write_json
from keeplora.train.config import parse_config
from keeplora.train.record import RunRecord, run_folder, save_result, versions

TASKS = ["ants <b>&amp;", "</script><script>alert(1)</script>", "cats $x_$ y"]
LABELS = ["zero-shot", "lora", "keeplora"]


def layer(name, tower, depth, protected):
    return {
        "name": name, "tower": tower, "depth": depth, "in_features": 32, "protected": protected, "free": 32 - protected,
        "added": 4, "forecast": 2, "added_by_task": [4, 4, 4], "share": None,
    }  # fmt: skip


def record_of(label, seed, failed=""):
    accuracy = [[0.5, 0.25, 0.125]] * 3
    certificates, capacity, earlier = [None] * 3, [], []
    if label != "zero-shot":
        accuracy = [[0.9, 0.2, 0.1], [0.7, 0.8, 0.1], [0.6, 0.8 + seed / 16, 0.9]]
    if label == "keeplora":
        worst = {"leak": 1e-8, "leak_after_rounding": 1e-6, "orthogonality": 2e-7, "captured": 0.9876}
        certificates = [{**worst, "leak": 1e-8 * (task + 1)} for task in range(3)]
        capacity = [layer("v.0.q", "vision", 0, 18), layer("v.0.k", "vision", 0, 6), layer("t.1.q", "text", 1, 8)]
        earlier = ["validation"]
    finished = 1 if failed else 3
    figures = [accuracy, [0.4, 0.3, 0.2], [1.0] * 3, [2.0] * 3, [0.5] * 3, [0.25] * 3, certificates]
    return RunRecord(
        label, seed, TASKS, *(values[:finished] for values in figures), capacity, [64, 64, 32], 30, 10**9, [0.22, 0.2],
        earlier, failed=failed,
    )  # fmt: skip


def config_of(folder, methods=("lora", "keeplora"), seeds=(0, 1), **settings):
    own = {"keeplora": {"learning_rate": 2e-3, "r": 8}}
    if settings.get("benchmark") == "mtil":
        settings["model"] = {"transformers": "openai/clip-vit-base-patch16"}
    return parse_config({
        "benchmark": "embedded", "methods": list(methods), "seeds": list(seeds), "epochs": 1, "out": str(folder),
        "method": own, **settings,
    })  # fmt: skip


def keep(config, records):
    """A folder as a run leaves it between two results."""
    write_json(f"{config.out}/config.json", {**config.as_dict(), "data": "0123", "versions": [versions()]})
    for record in records:
        where = run_folder(config.out, record.label, record.seed)
        save_result(where, record, config.identity(record.label, record.seed), keep_state=False)
