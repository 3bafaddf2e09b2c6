"""Arrays from files that other libraries write, without those libraries and without running anything."""

from pathlib import Path

from bnjax.tools.convert._correspondence import Array
from bnjax.tools.files._keras import read_h5, read_keras
from bnjax.tools.files._npz import read_npz
from bnjax.tools.files._safetensors import read_safetensors

_READERS = {".safetensors": read_safetensors, ".npz": read_npz, ".h5": read_h5, ".hdf5": read_h5, ".keras": read_keras}
_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".pkl", ".pickle", ".joblib")


def read_arrays(file: str | Path) -> dict[str, Array]:
    r"""Returns the arrays of a `.safetensors`, `.npz`, `.h5` or `.keras` file, by name.

    Nothing in a file is executed: no pickles, no code of layers. Every array is checked against what the file says of
    it, :math:`\text{bytes} = \prod_i \mathrm{shape}_i \cdot \text{bytes of one element}`, and against the size of the
    file, before memory is taken for it. `.safetensors` needs the package safetensors, `.h5` and `.keras` need h5py:
    `pip install "bnjax[files]"`.

    Args:
      file: its path.

    Returns:
      Arrays of any shapes by name. bfloat16 and float8 become float32, which holds them exactly. Those of a safetensors
      file are parts of one block of memory. Keras' files give the weights of the model alone, by `layer/weight`; a
      `.weights.h5` file of Keras 3, which does not name the weights of a layer, by `layer/vars/0` and so on.

    Raises:
      ValueError: a file of another kind, or one that is damaged or made to mislead; file and member are named.
      ImportError: the package that reads such files is not installed.

    Examples:
      >>> import numpy as np, tempfile
      >>> from bnjax import tools
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     np.savez(folder + "/state.npz", weight=np.ones(2))
      ...     tools.read_arrays(folder + "/state.npz")
      {'weight': array([1., 1.])}
    """
    file = Path(file)
    if file.suffix in _READERS:
        return _READERS[file.suffix](file)
    if file.suffix in _PICKLES:
        raise ValueError(
            f"read_arrays does not read {file.name}: such files may run code. Where PyTorch is there and the file is "
            "trusted, give what torch.load returns, or safetensors.torch.save_file(state, 'state.safetensors')."
        )
    raise ValueError(f"read_arrays takes {', '.join(_READERS)}; got {file.name}.")
