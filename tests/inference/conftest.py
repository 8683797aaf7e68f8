"""Tokenizers trained on the spot, and one thread: threads cost tiny models more than they give."""

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from instil.prompt import Tokenizer

from ..prompt.conftest import tokenizer_of  # noqa: F401 (a fixture)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def dirty_memory(monkeypatch):
    """What is not written holds no numbers, as it may in any run."""
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, size: self.new_full(size, torch.nan))


@pytest.fixture
def letters():
    """A tokenizer of 64 letters for models of 64 tokens: its texts tell their tokens."""
    backend = Backend(models.WordLevel({chr(0x4E00 + n): n for n in range(64)}, "一"))
    backend.decoder = decoders.Fuse()
    return Tokenizer(backend, {}, name="letters")
