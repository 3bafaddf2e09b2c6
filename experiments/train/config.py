"""The options of a training run, checked before any work starts."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from experiments.errors import ConfigError


@dataclass(frozen=True)
class Training:
    """What the numbers depend on. A resumed run must repeat these."""

    data: Literal["mnist-5k", "fashion-mnist", "cifar-10"] = "mnist-5k"
    """mnist-5k: 4,000 + 1,000 real digits, embedded. fashion-mnist: the MNIST-format folder --data-dir. cifar-10: its
    binary files in --data-dir."""
    model: Literal["convnet", "resnet20"] = "convnet"
    """convnet: three blocks of convolution and norm. resnet20: of He et al. 2016, for 28×28 and 32×32 images."""
    epochs: int = 30
    """Passes over the training images."""
    batch_size: int = 64
    """Images per step, over all the devices together."""
    accumulate: int = 1
    """Cut each batch into so many micro-batches, one after the other: less memory, and BN sees micro-batches."""
    lr: float = 3e-3
    """Peak learning rate of AdamW."""
    warmup: float = 0.1
    """Fraction of the steps over which the learning rate rises; then half a cosine down to zero."""
    weight_decay: float = 0.05
    """Decoupled weight decay of the kernels. BN's scale and bias, and every other bias, are left out."""
    momentum: float = 0.9
    """Weight of the old value in BN's running averages."""
    width: int = 16
    """Channels of the first block or stage; the second has two times, the third four times as many."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of activations and their gradients; parameters, statistics and sums stay float32. float16 scales the loss."""
    skip_nonfinite: int = 20
    """Steps in a row whose gradient is NaN or Inf may change nothing, up to so many; one more is an error. A resumed
    run may have another limit."""
    max_shift: int = 2
    """Move every training image at random by up to so many pixels each way; 0 for none."""
    flip: bool = False
    """Mirror every second training image, left to right; not for digits."""
    seed: int = 0
    """Of the parameters, the order of the data and the shifts."""


@dataclass(frozen=True)
class Hardware:
    """Where it runs. All of it may change at a resume: the numbers then agree to rounding."""

    partition: Literal["shard_map", "jit"] = "shard_map"
    """shard_map: the step names its devices. jit: XLA places the collectives. Both give the same numbers."""
    devices: int | None = None
    """Use this many devices, simulated where the machine has only a CPU; by default all there are."""
    coordinator: str | None = None
    """host:port of the first process, when several processes train together."""
    processes: int = 1
    """How many processes train together; the batch is split over all their devices."""
    process_id: int = 0
    """The number of this process among them, from 0."""
    heartbeat_timeout: int = 60
    """Seconds after which a process that gives no sign of life is lost, and the others end with an error."""


@dataclass(frozen=True)
class Files:
    """What is read and written."""

    data_dir: Path = Path("/usr/share/datasets/fashion-mnist")
    """Folder with the four MNIST-format IDX files, plain or .gz; or with CIFAR-10's six binary files."""
    runs: Path = Path("runs/train")
    """Folder of the numbered runs: each start makes the next number in it."""
    out: Path | None = None
    """Write to this folder instead of a numbered one."""
    resume: bool = False
    """Go on with the latest run in --runs (or with --out) exactly where it stopped; begin where there is none yet."""
    stop_after: int | None = None
    """Stop with a checkpoint once this many steps are done, as SIGTERM does."""
    log_every: int = 10
    """Steps between two transfers of metrics from the devices."""
    save_every: int | None = None
    """Steps between two checkpoints, besides the one after each epoch."""
    keep: int = 3
    """How many checkpoints stay."""


@dataclass(frozen=True)
class Config:
    training: Training = field(default_factory=Training)
    hardware: Hardware = field(default_factory=Hardware)
    files: Files = field(default_factory=Files)
    smoke: bool = False
    """A run of seconds: other defaults for --epochs and --width."""


def defaults(smoke: bool) -> Config:
    """The default options, or those of --smoke, which further options still override."""
    full = Config()
    return replace(full, training=replace(full.training, epochs=1, width=8)) if smoke else full


def require(holds: bool, otherwise: str) -> None:
    """Raises ConfigError with `otherwise` unless `holds`."""
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
        "devices": hardware.devices,
        "processes": hardware.processes,
        "heartbeat-timeout": hardware.heartbeat_timeout,
        "stop-after": files.stop_after,
        "log-every": files.log_every,
        "save-every": files.save_every,
        "keep": files.keep,
    }
    for name, value in positive.items():
        require(value is None or 0 < value < float("inf"), f"--{name} {value}: expected a positive number")
    for name, value in {"warmup": training.warmup, "momentum": training.momentum}.items():
        require(0 <= value < 1, f"--{name} {value}: expected at least 0 and less than 1")
    require(0 <= training.weight_decay < float("inf"), f"--weight-decay {training.weight_decay}: expected 0 or more")
    require(0 <= training.max_shift < 28, f"--max-shift {training.max_shift}: expected 0 to 27")
    require(training.skip_nonfinite >= 0, f"--skip-nonfinite {training.skip_nonfinite}: expected 0 or more")
    require(0 <= training.seed < 2**31, f"--seed {training.seed}: expected at least 0 and less than 2^31")
    require(
        0 <= hardware.process_id < hardware.processes,
        f"--process-id {hardware.process_id}: expected 0 to {hardware.processes - 1}, one less than --processes",
    )
    require(
        (hardware.coordinator is None) == (hardware.processes == 1),
        "--coordinator and --processes (2 or more) go together",
    )


def check_split(batch_size: int, devices: int, accumulate: int, records: int) -> None:
    """Every device gets the same number of images in each micro-batch, and there is at least one whole batch."""
    over = f"{devices} devices" + (f" and {accumulate} micro-batches" if accumulate > 1 else "")
    parts = devices * accumulate
    require(
        batch_size % parts == 0,
        f"--batch-size {batch_size} does not divide over {over}: "
        f"expected a multiple, such as {-(-batch_size // parts) * parts}, or another --devices",
    )
    require(batch_size <= records, f"--batch-size {batch_size}: there are only {records} training images")
