"""Defines the options of a training run, and checks them before any work starts."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from experiments.errors import ConfigError


@dataclass(frozen=True)
class Training:
    """Options that change the numbers. A resumed run must repeat them."""

    data: Literal["mnist-5k", "fashion-mnist", "cifar-10", "photos"] = "mnist-5k"
    """mnist-5k: 4,000 + 1,000 real digits, embedded. fashion-mnist: the MNIST-format folder --data-dir. cifar-10: its
    binary files in --data-dir. photos: image files by class, or ArrayRecord files, in --data-dir."""
    model: Literal["convnet", "resnet20", "resnet26", "resnet50"] = "convnet"
    """convnet: three blocks of convolution and norm. resnet20: of He et al. 2016, for 28×28 and 32×32 images. resnet26
    and resnet50: with bottlenecks, for photos."""
    epochs: int = 30
    """Passes over the training images."""
    batch_size: int = 64
    """Images per step, over all the devices together."""
    accumulate: int = 1
    """Micro-batches per batch, computed one after the other: less memory, and BN normalizes each by itself."""
    optimizer: Literal["adamw", "sgd", "lamb"] = "adamw"
    """adamw and lamb decay weights apart from the gradient; sgd adds the decay to it, and has a Nesterov momentum of
    0.9."""
    lr: float = 3e-3
    """Peak learning rate."""
    warmup: float = 0.1
    """Fraction of the steps over which the learning rate rises; then half a cosine down to zero."""
    weight_decay: float = 0.05
    """Weight decay of the kernels. BN's scale and bias, and every other bias, are left out."""
    label_smoothing: float = 0.0
    """Part of the label that is spread over all classes."""
    momentum: float = 0.9
    """Weight of the old value in BN's running averages."""
    bn_group: int | None = None
    """Devices that share the statistics of a batch: None all of them, 1 each for itself, 16 groups of 16. The running
    averages are those of all devices in any case."""
    zero_scale: bool = False
    """Begin with a scale of zero in the last BN of each block of resnet26 and resnet50."""
    ema: float = 0.0
    """Decay of an exponential average of the weights, which is evaluated and exported at the end; 0 for none."""
    recalibrate: int = 0
    """Batches over which BN's statistics are taken again at the end; 0 keeps the running averages."""
    width: int = 16
    """Channels of the first block or stage; the second has two times, the third four times as many."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of activations and gradients; parameters, statistics and sums are float32; float16 scales the loss."""
    skip_nonfinite: int = 20
    """How many steps in a row may be skipped because their gradient is NaN or Inf; one more is an error. A resumed run
    may have another limit."""
    max_shift: int = 2
    """Shift every training image at random by up to this many pixels each way; 0 for no shift."""
    flip: bool = False
    """Mirror every second training image, left to right; not for digits. Photos are always mirrored so."""
    image_size: int = 224
    """Side in pixels of the parts that are cut from photos."""
    seed: int = 0
    """Seed of the parameters, the order of the data and the shifts."""


@dataclass(frozen=True)
class Hardware:
    """Options that say where a run executes. All of them may change at a resume: the numbers then agree to rounding."""

    partition: Literal["shard_map", "jit"] = "shard_map"
    """shard_map: the step names its devices. jit: XLA places the collectives. Both give the same numbers."""
    devices: int | None = None
    """Number of devices to use, simulated if the machine has only a CPU; by default all devices."""
    cluster: Literal["auto", "mpi4py", "off"] = "auto"
    """auto: join the other processes that Slurm, Open MPI 4, a TPU pod or a job of Kubernetes started. mpi4py: ask this
    package, for any MPI. off: train alone, or by --coordinator."""
    coordinator: str | None = None
    """host:port of the first process, when several processes train together and no launcher says it."""
    processes: int | None = None
    """How many processes train together; the batch is split over all their devices."""
    process_id: int | None = None
    """The number of this process among them, from 0."""
    join_timeout: int = 300
    """Seconds to wait for the other processes at the start; who is missing is said every ten seconds."""
    heartbeat_timeout: int = 60
    """Seconds without a heartbeat after which a process counts as lost, and the others end with an error."""


@dataclass(frozen=True)
class Files:
    """Options that say what is read and written."""

    data_dir: Path = Path("/usr/share/datasets/fashion-mnist")
    """Folder with the four MNIST-format IDX files, plain or .gz; or with CIFAR-10's six binary files."""
    runs: Path = Path("runs/train")
    """Folder of the numbered runs: each start makes the next number in it."""
    out: Path | None = None
    """Write to this folder instead of a numbered one."""
    resume: bool = False
    """Go on with the latest run in --runs (or with --out) exactly where it stopped; without one, start a new run."""
    stop_after: int | None = None
    """Stop with a checkpoint once this many steps are done, as SIGTERM does."""
    log_every: int = 10
    """Steps between two transfers of metrics from the devices to the host."""
    save_every: int | None = None
    """Steps between two checkpoints, besides the one after each epoch."""
    workers: int = 8
    """Processes that decode photos, for each process that trains; 0 decodes in threads of the training process."""
    damaged: Literal["skip", "error"] = "skip"
    """skip: another image stands in for one that cannot be decoded, and its name is printed. error: it ends the run."""
    export: bool = False
    """Fold BN into the convolutions at the end, and write the network as model.jax, which jax.export reads."""
    keep: int = 3
    """How many checkpoints to keep; older ones are deleted."""


@dataclass(frozen=True)
class Config:
    training: Training = field(default_factory=Training)
    hardware: Hardware = field(default_factory=Hardware)
    files: Files = field(default_factory=Files)
    smoke: bool = False
    """Run for seconds only: other defaults for --epochs and --width."""
    recipe: str | None = None
    """Take other defaults from experiments/train/recipes/RECIPE.toml, or from a file .toml of your own."""


def require(holds: bool, otherwise: str) -> None:
    """Raises ConfigError with the message `otherwise` unless `holds`."""
    if not holds:
        raise ConfigError(otherwise)


def validate(config: Config) -> None:
    """Raises ConfigError on the first option that cannot work on any machine."""
    training, hardware, files = config.training, config.hardware, config.files
    positive = {
        "epochs": training.epochs,
        "batch-size": training.batch_size,
        "accumulate": training.accumulate,
        "lr": training.lr,
        "width": training.width,
        "bn-group": training.bn_group,
        "image-size": training.image_size,
        "devices": hardware.devices,
        "processes": hardware.processes,
        "heartbeat-timeout": hardware.heartbeat_timeout,
        "join-timeout": hardware.join_timeout,
        "stop-after": files.stop_after,
        "log-every": files.log_every,
        "save-every": files.save_every,
        "keep": files.keep,
    }
    for name, value in positive.items():
        require(value is None or 0 < value < float("inf"), f"--{name} {value}: expected a positive number")
    fractions = {"warmup": training.warmup, "momentum": training.momentum, "ema": training.ema}
    for name, value in {**fractions, "label-smoothing": training.label_smoothing}.items():
        require(0 <= value < 1, f"--{name} {value}: expected at least 0 and less than 1")
    require(0 <= training.weight_decay < float("inf"), f"--weight-decay {training.weight_decay}: expected 0 or more")
    require(0 <= training.max_shift < 28, f"--max-shift {training.max_shift}: expected 0 to 27")
    require(training.recalibrate >= 0, f"--recalibrate {training.recalibrate}: expected 0 or more")
    require(files.workers >= 0, f"--workers {files.workers}: expected 0 or more")
    require(
        training.bn_group is None or hardware.partition == "shard_map",
        "--partition jit normalises by the whole batch: leave out --bn-group, or write --partition shard_map",
    )
    require(
        (training.data == "photos") == (training.model in ("resnet26", "resnet50")),
        f"--data {training.data} and --model {training.model} do not fit: photos take resnet26 or resnet50, small "
        "images convnet or resnet20",
    )
    require(training.skip_nonfinite >= 0, f"--skip-nonfinite {training.skip_nonfinite}: expected 0 or more")
    require(0 <= training.seed < 2**31, f"--seed {training.seed}: expected at least 0 and less than 2^31")


def address(coordinator: str) -> tuple[str, int]:
    """Returns host and port of HOST:PORT; an IPv6 address stands in brackets.

    Raises:
        ConfigError: the text is no such address.
    """
    host, _, port = coordinator.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host.replace(":", "/")
    named = bool(bare) and not any(c.isspace() or c in "/[]" for c in bare)
    good = named and port.isascii() and port.isdigit() and 0 < int(port) < 2**16
    require(good, f"--coordinator {coordinator!r}: expected HOST:PORT, a port from 1 to 65535, such as node001:4321")
    return bare, int(port)


def settings(config: Config) -> dict[str, object]:
    """Returns the options that every process of a run must share, by the names that the command line has for them.

    Which process it is and how it joins differs, and so may the place of the data on each machine.
    """
    own = {"cluster", "coordinator", "processes", "process_id", "join_timeout", "data_dir"}
    parts = [asdict(part) for part in (config.training, config.hardware, config.files)]
    return {f"--{name.replace('_', '-')}": value for part in parts for name, value in part.items() if name not in own}


def check_split(batch_size: int, devices: int, accumulate: int, records: int, group: int | None = None) -> None:
    """Raises ConfigError unless the batch divides evenly over devices and micro-batches, and fits into the data."""
    over = f"{devices} devices" + (f" and {accumulate} micro-batches" if accumulate > 1 else "")
    parts = devices * accumulate
    require(
        batch_size % parts == 0,
        f"--batch-size {batch_size} does not divide over {over}: "
        f"expected a multiple, such as {-(-batch_size // parts) * parts}, or another --devices",
    )
    require(devices % (group or 1) == 0, f"--bn-group {group}: expected a divisor of the number of devices, {devices}")
    require(batch_size <= records, f"--batch-size {batch_size}: there are only {records} training images")
