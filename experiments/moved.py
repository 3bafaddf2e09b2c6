"""Redirects old names of commands: `python -m experiments.repro_wu2018_figure1` prints the new name and
exits with 2.
"""

from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Any

MOVED = {  # below `experiments.`
    "plots": "train.plots",
    "repro.order": "article.order",
    "repro_bjorck2018_figure1": "repro.bjorck2018",
    "repro_he2016_resnet20": "repro.he2016",
    "repro_hoffer2017_large_batches": "repro.hoffer2017",
    "repro_ioffe2015_figure1": "repro.ioffe2015",
    "repro_luo2019_overfitting": "repro.luo2019",
    "repro_santurkar2018_figure4": "repro.santurkar2018",
    "repro_schneider2020_corruptions": "repro.schneider2020",
    "repro_shen2020_text": "repro.shen2020",
    "repro_vanlaarhoven2017_regularisers": "repro.vanlaarhoven2017",
    "repro_wu2018_figure1": "repro.wu2018",
    "repro_wujohnson2021_precise_bn": "repro.wujohnson2021",
    "bench.accumulation": "bench.compiled.accumulation",
    "bench.aot": "bench.compiled.aot",
    "bench.layers": "bench.clock.layers",
    "bench.scaling": "bench.clock.scaling",
    "bench.scaling_processes": "bench.clock.scaling.processes",
    "bench.training": "bench.clock.training",
    "bench.training_memory": "bench.compiled.memory",
    "bench.tried": "bench.clock.tried",
}
GONE = {
    "bench.fusion": "README.md, section Speed, says what it found",
    "bench.pallas_rows": "experiments/bench/README.md, section No Pallas kernel, says what it found",
}


def message(name: str) -> str:
    """Returns the text that a user of an old command name sees: the new name, or where the findings are."""
    if name in GONE:
        return f"experiments.{name} is gone: {GONE[name]}"
    return f"experiments.{name} is experiments.{MOVED[name]} now"


class Moved(MetaPathFinder, InspectLoader):
    """Finds modules by their old names, after every other finder: `python -m` prints the new name, an
    import raises it.
    """

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Returns a spec for an old name, and None for any other name."""
        name = fullname.removeprefix("experiments.")
        return ModuleSpec(fullname, self) if name in MOVED or name in GONE else None

    def get_code(self, fullname: str) -> CodeType:
        """Returns the code that `python -m` runs: it prints the message to standard error and exits with status 2."""
        text = message(fullname.removeprefix("experiments."))
        return compile(f"import sys; print({text!r}, file=sys.stderr); sys.exit(2)", fullname, "exec")

    def exec_module(self, module: ModuleType) -> None:
        """Raises ModuleNotFoundError with the message: an old name cannot be imported."""
        raise ModuleNotFoundError(message(module.__name__.removeprefix("experiments.")), name=module.__name__)

    def get_source(self, fullname: str) -> None:
        """Returns None, because an old name has no source file."""
