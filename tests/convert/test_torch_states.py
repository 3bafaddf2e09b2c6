"""Tests the kinds of PyTorch states that users have: one network gives the same values in each."""

import importlib.util

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnjax
from bnjax import tools
from tests.support import zoo

if importlib.util.find_spec("torch"):
    import torch

    class Net(torch.nn.Module):
        """A network with a transposed convolution whose kernel shape does not tell that it is transposed."""

        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 3)
            self.bn = torch.nn.BatchNorm2d(4)
            self.up = torch.nn.ConvTranspose2d(4, 4, 2, stride=2)

        def forward(self, x):
            return self.up(torch.relu(self.bn(self.conv(x))))

    class Here(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(4, (3, 3), padding="VALID", name="conv")(x)
            x = nn.relu(bnjax.BatchNorm(use_running_average=True, name="bn")(x))
            return nn.ConvTranspose(4, (2, 2), (2, 2), "VALID", name="up")(x)

    def forms(net):
        """Yields the values of a network in every form that users store them in."""
        state = net.state_dict()
        yield "a state dict", state
        yield "arrays", {k: v.numpy() for k, v in state.items()}
        yield "a module", net
        yield "keep_vars", net.state_dict(keep_vars=True)
        yield (
            "a checkpoint",
            {"state_dict": state, "epoch": 3, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}},
        )
        yield "a checkpoint of another name", {"model_state_dict": state, "epoch": 3, "loss": torch.ones(())}
        yield "a checkpoint with a module", {"net": net, "epoch": 1}
        yield "DataParallel", torch.nn.DataParallel(net)
        yield "DataParallel, its state", torch.nn.DataParallel(net).state_dict()
        yield "torch.compile", torch.compile(net, backend="eager")
        yield "torch.compile, its state", torch.compile(net, backend="eager").state_dict()
        yield "both", {f"module._orig_mod.{k}": v for k, v in state.items()}
        yield (
            "columns first",
            {k: v.to(memory_format=torch.channels_last) if v.ndim == 4 else v for k, v in state.items()},
        )
        yield "sparse", {k: v.to_sparse() if v.ndim == 4 else v for k, v in state.items()}

    def test_every_form_of_a_torch_network():
        torch.manual_seed(0)
        net = Net().eval()
        net.bn.running_mean.normal_()
        net.bn.running_var.uniform_(0.5, 2)
        images = torch.randn(2, 3, 6, 6)
        wanted = net(images).detach().permute(0, 2, 3, 1).numpy()
        x = images.permute(0, 2, 3, 1).numpy()
        blank = jax.eval_shape(Here().init, jax.random.key(0), x)
        for what, form in forms(net):
            variables = tools.from_torch(form, blank, apply_fn=Here().apply, x=x)
            np.testing.assert_allclose(Here().apply(variables, x), wanted, rtol=0, atol=1e-5, err_msg=what)
            names = tools.propose_names(form, blank, library="torch", apply_fn=Here().apply, x=x)
            assert names == {"conv": "conv", "bn": "bn", "up": "up"}, what
        back = tools.to_torch(variables, transposed=["up"])
        again = Net().eval()
        again.load_state_dict({k: torch.tensor(v) for k, v in back.items()})
        torch.testing.assert_close(again(images), net(images))
        again.load_state_dict({k: torch.from_numpy(v) for k, v in back.items()})

    def test_training_on_changes_nothing_here():
        net = Net()
        variables = tools.from_torch(net, Here().init(jax.random.key(0), jnp.ones((1, 6, 6, 3))))
        before = jax.tree.map(np.array, variables)
        with torch.no_grad():
            for value in net.state_dict().values():
                value.fill_(3)
        zoo.assert_trees_equal(jax.tree.map(np.array, variables), before)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64", "float8_e4m3fn", "float8_e5m2"])
    def test_tensors_of_every_dtype(dtype):
        state = {k: v.to(getattr(torch, dtype)) if v.ndim else v for k, v in Net().state_dict().items()}
        blank = Here().init(jax.random.key(0), jnp.ones((1, 6, 6, 3)))
        variables = tools.from_torch(state, blank, transposed=["up"])
        wanted = {k: v.to(torch.float32).numpy() for k, v in state.items()}
        for name, value in tools.to_torch(variables, transposed=["up"]).items():
            np.testing.assert_array_equal(value, wanted[name], err_msg=name)

    def test_states_that_are_none():
        blank = Here().init(jax.random.key(0), jnp.ones((1, 6, 6, 3)))
        state = Net().state_dict()
        for given, message in [
            ({"model": state, "ema": state}, r"several states, \['model', 'ema'\]: give one, such as state\['model'\]"),
            ([state], "got list"),
            ("net.pt", "read_arrays"),
            ({k: v.to("meta") for k, v in state.items()}, "device meta"),
        ]:
            with pytest.raises(ValueError, match=message):
                tools.from_torch(given, blank, transposed=["up"])
