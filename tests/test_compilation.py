"""`--compile`: compiled layers give what the others give, shapes stay few, and without a compiler training goes on."""

import logging

import pytest
import torch
from torch import nn

from beit3.model import compilation
from beit3.model.compilation import compile_layers, compiler_problem
from tests import reference
from tests.test_captioning_dataset import small_model
from tests.test_models import small_encoder

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(compiler_problem(CPU) is not None, reason="no working C++ compiler")


def answer_gradients(encoder: nn.Module, lengths: list[int], width: int) -> list[torch.Tensor]:
    """What VQA's way through the encoder gives, and gradients near its input and its output."""
    torch.manual_seed(3)  # drop path
    ids, padding = reference.tokens(2, lengths, vocab_size=50, width=width)
    features, _ = encoder(reference.images(1, 2, 32), ids, padding, image_rows=1, text_rows=0)
    encoder.zero_grad()
    features.sin().sum().backward()
    layers = encoder.encoder.layers
    return [features.detach(), layers[0].ffn.B.fc1.weight.grad, layers[-1].ffn.A.fc2.weight.grad]


@needs_compiler
@pytest.mark.slow
def test_compiled_layers_give_the_same_and_are_compiled_a_handful_of_times():
    plain, compiled = (small_encoder(drop_path_rate=0.5).train() for _ in range(2))
    compiled.load_state_dict(plain.state_dict())
    assert compile_layers(compiled, CPU)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for lengths, width in [([7, 4], 7), ([16, 16], 16), ([9, 2], 9), ([17, 5], 17), ([30, 24], 32)]:
        torch.testing.assert_close(
            answer_gradients(compiled, lengths, width), answer_gradients(plain, lengths, width), rtol=1e-4, atol=1e-5
        )
    # Texts of up to 16 tokens and of up to 32, in layers before the last one and in the last one.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4
    assert not torch._dynamo.utils.counters["graph_break"]


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_layers_give_the_same_for_several_captions_of_a_picture(recompute):
    gradients = []
    ids, padding = reference.tokens(2, [7, 4, 5, 6], vocab_size=50, width=7)
    for compiled in (False, True):
        model = small_model(drop_path_rate=0.5, recompute_activations=recompute and compiled).train()
        if compiled:
            assert compile_layers(model.beit3, CPU)
        torch.manual_seed(3)
        images = reference.images(1, 2, 32)
        logits = model(image=images, text_ids=ids, padding_mask=padding, language_masked_pos=1 - padding)
        logits.sin().sum().backward()
        gradients.append([logits.detach(), model.beit3.encoder.layers[0].ffn.A.fc1.weight.grad])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


def test_evaluation_runs_as_without():
    encoder = small_encoder().eval()
    encoder.compiled_layer = lambda *_: pytest.fail("evaluation uses compiled layers")
    ids, padding = reference.tokens(2, [7, 4], vocab_size=50, width=7)
    with torch.no_grad():
        _, text = encoder(reference.images(1, 2, 32), ids, padding)
    assert text.shape[1] == 7


def test_weights_keep_their_names():
    encoder = small_encoder()
    names = list(encoder.state_dict())
    encoder.compiled_layer = compilation._call
    assert list(encoder.state_dict()) == names


def test_without_a_compiler_training_goes_on_and_says_so(monkeypatch, caplog):
    def no_compiler(*_, **__):
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found in g++\nand more")

    monkeypatch.setattr(torch, "compile", no_compiler)
    encoder = small_encoder().train()
    with caplog.at_level(logging.WARNING):
        assert not compile_layers(encoder, CPU)
    assert encoder.compiled_layer is None
    (record,) = caplog.records
    assert "goes on without" in record.getMessage() and "No working C++ compiler found in g++" in record.getMessage()
    assert "\n" not in record.getMessage()
