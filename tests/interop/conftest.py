"""A small PyTorch network with HF PEFT's adapters."""

import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from peft_toolbox import LAYERS, VOCABULARY


@pytest.fixture(scope="session")
def oracle():
    """``torch``, ``peft`` and a network class; imported once, it takes seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what these libraries tell each other
        import peft
        import torch

    torch.set_num_threads(1)

    class Net(torch.nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.tokens = torch.nn.Embedding(VOCABULARY, LAYERS["up"][0])
            for name, sizes in LAYERS.items():
                setattr(self, name, torch.nn.Linear(*sizes))
            scramble(self, seed)

        def forward(self, ids):
            x = self.tokens(ids)
            for name in LAYERS:
                x = torch.tanh(getattr(self, name)(x))
            return x

    def scramble(module, seed):
        """Redraws everything, so that nothing is at its initial value."""
        generator = torch.Generator().manual_seed(seed)
        for parameter in module.parameters():
            shape = parameter.shape
            parameter.data = 0.3 * torch.randn(shape, generator=generator)

    def adapt(net, config, seed):
        """PEFT's model, its adapter leaves scrambled, the base left alone."""
        model = peft.get_peft_model(net, config)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data = 0.3 * noise
        return model.eval()

    return SimpleNamespace(torch=torch, peft=peft, Net=Net, adapt=adapt)


@pytest.fixture
def ids():
    return np.random.default_rng(0).integers(0, VOCABULARY, (4, 6))


@pytest.fixture
def weights():
    """A fixed direction to make a scalar of the outputs with."""
    return np.random.default_rng(1).normal(size=(4, 6, 8)).astype(np.float32)


@pytest.fixture(scope="module", autouse=True)
def quick(quick_compiles):
    """Every file here is of tiny programs, compiled for a call or two."""
