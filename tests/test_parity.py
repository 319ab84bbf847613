"""The same numbers as transformers, forward and backward, from weights that it wrote; and it loads what we write."""

import copy
import functools
import json
import os
import re

import jax
import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForPreTraining, BertConfig, BertForPreTraining

from bert_jax import convert
from bert_jax.config import ModelConfig
from bert_jax.data.features import Features, collate
from bert_jax.errors import CheckpointError
from bert_jax.heads import Pooler
from bert_jax.sharding import named_leaves
from bert_jax.tasks import classify, encode, init_encoder, ner, pretrain, squad

VOCAB = 150
TOLERANCE = 1e-5  # of the largest entry


@pytest.fixture(scope="module", params=["gelu", "gelu_new"])
def reference(request, tmp_path_factory):
    """(their model, our loaded model) of one random initialisation, far from zero and from the identity."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    config = BertConfig(vocab_size=VOCAB, hidden_act=request.param, initializer_range=0.2, **sizes)
    torch.manual_seed(0)
    model = BertForPreTraining(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "LayerNorm" in name or name.endswith("bias"):
                value += 0.2 * torch.randn_like(value)
    folder = tmp_path_factory.mktemp("reference") / request.param
    model.save_pretrained(folder)
    return model, convert.load_model(str(folder))


def inputs(lengths: list[int], width: int):
    """(their batch, ours) of random texts with type ids, padded to `width`."""
    rng = np.random.default_rng(sum(lengths))
    ids = [rng.integers(1, VOCAB, length).astype(np.int32) for length in lengths]
    types = [(np.arange(length) >= length // 2).astype(np.int32) for length in lengths]
    ours = collate(Features(ids, types), np.arange(len(ids)), 0, width)
    theirs = {"input_ids": ours["input_ids"], "token_type_ids": ours["token_type_ids"]}
    theirs = {name: torch.tensor(value.astype(np.int64)) for name, value in theirs.items()}
    theirs["attention_mask"] = torch.tensor((ours["segment_ids"] > 0).astype(np.int64))
    return theirs, ours


def assert_close(ours, theirs, what, scale=None):
    theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else theirs
    scale = np.abs(theirs).max() if scale is None else scale
    error = np.abs(np.asarray(ours) - theirs).max() / scale
    assert error <= TOLERANCE, f"{what}: {error:.2e}"


@pytest.mark.parametrize("lengths", [[1], [2, 1], [7, 3, 5], [64, 17], [512, 100]], ids=str)
def test_hidden_states_pooler_and_logits(reference, lengths):
    model, ours = reference
    theirs, batch = inputs(lengths, max(lengths))
    with torch.no_grad():
        found = model(**theirs, output_hidden_states=True)
        pooled = model.bert(**theirs).pooler_output
    real = batch["segment_ids"] > 0
    states = jax.jit(functools.partial(encode, ours.config, all_layers=True))(ours.params, batch)
    assert states.shape[0] == len(found.hidden_states) == 4
    for layer, state in enumerate(found.hidden_states):
        assert_close(states[layer][real], state.numpy()[real], f"layer {layer}")
    first = states[-1][:, 0]
    assert_close(Pooler(ours.config).apply({"params": ours.params["pooler"]}, first), pooled, "pooler")
    logits = pretrain.masked_lm_logits(ours.config, ours.params, states[-1])[..., :VOCAB]
    assert_close(logits[real], found.prediction_logits.numpy()[real], "masked LM")
    assert_close(
        pretrain.next_sentence_logits(ours.config, ours.params, first), found.seq_relationship_logits, "next sentence"
    )


@pytest.mark.parametrize("lengths", [[7, 3, 5], [512, 100]], ids=str)
def test_losses_and_the_gradient_of_each_parameter(reference, lengths):
    # Their float64 is the yardstick: in float32 their own gradients are up to 1.7e-5 away from it, ours 2.8e-6.
    model, ours = copy.deepcopy(reference[0]).double(), reference[1]
    theirs, batch = inputs(lengths, max(lengths))
    labels = np.full(batch["input_ids"].shape, -100)
    labels[:, ::3] = np.where(batch["segment_ids"] > 0, (batch["input_ids"] * 7) % VOCAB, -100)[:, ::3]
    following = np.arange(len(lengths)) % 2
    loss = model(**theirs, labels=torch.tensor(labels), next_sentence_label=torch.tensor(following)).loss
    loss.backward()
    expected = {name: value.grad.numpy() for name, value in model.named_parameters()}

    positions = np.broadcast_to(np.arange(0, labels.shape[1], 3), labels[:, ::3].shape)
    batch |= {
        "masked_lm_positions": positions,
        "masked_lm_ids": np.maximum(labels[:, ::3], 0),
        "masked_lm_weights": (labels[:, ::3] >= 0).astype(np.float32),
        "next_sentence_positions": np.zeros((len(lengths), 1), np.int32),
        "next_sentence_labels": following[:, None],
        "next_sentence_weights": np.ones((len(lengths), 1), np.float32),
    }

    def our_loss(params):
        sums = pretrain.sums(ours.config, params, batch, None)
        return sum(sums[name][0] / sums[name][1] for name in pretrain.LOSSES)

    value, gradients = jax.jit(jax.value_and_grad(our_loss))(ours.params)
    assert_close(value, loss, "loss")
    mine = convert.to_huggingface(gradients, ours.config)
    assert mine.keys() == expected.keys()
    for name, gradient in expected.items():
        # A key's bias shifts all scores of a query alike, so its gradient is 0 and what is computed is rounding.
        scale = np.abs(expected[name.replace("key", "query")]).max() if name.endswith("key.bias") else None
        assert_close(mine[name], gradient, name, scale)


def test_out_and_in_again_bit_for_bit(reference, tokenizer, tmp_path):
    model, ours = reference
    small = ours.config
    convert.save_model(str(tmp_path / "ours"), ours.params, small, tokenizer)
    again, told = AutoModelForPreTraining.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    for (name, value), (other, expected) in zip(again.named_parameters(), model.named_parameters(), strict=True):
        assert name == other
        np.testing.assert_array_equal(value.detach().numpy(), expected.detach().numpy(), err_msg=name)
    again.save_pretrained(tmp_path / "theirs")
    back = named_leaves(convert.load_model(str(tmp_path / "theirs")).params)
    for name, value in named_leaves(ours.params).items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)


HEADS = {
    "AutoModelForPreTraining": pretrain.init,
    "AutoModelForMaskedLM": lambda config, key: {
        name: value for name, value in pretrain.init(config, key).items() if name not in ("pooler", "nsp_head")
    },
    "AutoModelForSequenceClassification": lambda config, key: classify.init(config, 3, key),
    "AutoModelForTokenClassification": lambda config, key: ner.init(config, 3, key),
    "AutoModelForQuestionAnswering": squad.init,
    "AutoModel": lambda config, key: {"pooler": pretrain.init(config, key)["pooler"]} | init_encoder(config, key),
}


@pytest.mark.parametrize("name", HEADS)
def test_each_of_their_classes_loads_ours(tokenizer, tmp_path, name):
    config = ModelConfig(vocab_size=VOCAB, hidden_size=16, num_layers=2, num_heads=2, mlp_dim=24, hidden_act="gelu")
    params = jax.device_get(jax.jit(functools.partial(HEADS[name], config))(jax.random.key(1)))
    labels = ("a", "b", "c") if "TokenClass" in name or "SequenceClass" in name else ()
    convert.save_model(str(tmp_path / "m"), params, config, tokenizer, labels=labels)
    model, told = getattr(transformers, name).from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    assert json.loads((tmp_path / "m" / "config.json").read_text())["architectures"] == [type(model).__name__]
    theirs, batch = inputs([9, 4], 9)
    with torch.no_grad():
        found = model.eval()(**theirs)
    loaded = convert.load_model(str(tmp_path / "m"))
    assert loaded.labels == labels and not loaded.ignored
    back, expected = (convert.to_huggingface(tree, config) for tree in (loaded.params, params))
    assert back.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(back[path], value, err_msg=path)
    real = batch["segment_ids"] > 0
    if "SequenceClass" in name:
        assert_close(classify.logits(config, loaded.params, batch), found.logits, name)
    elif "TokenClass" in name:
        assert_close(np.asarray(ner.logits(config, loaded.params, batch))[real], found.logits.numpy()[real], name)
    elif "Question" in name:
        spans = np.asarray(squad.logits(config, loaded.params, batch))[real]
        assert_close(spans[:, 0], found.start_logits.numpy()[real], name)
        assert_close(spans[:, 1], found.end_logits.numpy()[real], name)


def google_names(tensors):
    """Hugging Face's names and layout -> those of google-research/bert, written from its modeling.py."""
    for name, value in tensors.items():
        if name == "cls.seq_relationship.weight":
            yield "cls/seq_relationship/output_weights", value
        elif name in ("cls.seq_relationship.bias", "cls.predictions.bias"):
            yield name.removesuffix(".bias").replace(".", "/") + "/output_bias", value
        elif re.fullmatch(r"bert\.embeddings\.\w+_embeddings\.weight", name):
            yield name.removesuffix(".weight").replace(".", "/"), value
        elif "LayerNorm" in name:
            leaf = {"weight": "gamma", "bias": "beta"}[name.rsplit(".", 1)[1]]
            yield re.sub(r"layer/(\d+)", r"layer_\1", name.rsplit(".", 1)[0].replace(".", "/")) + f"/{leaf}", value
        else:
            turned = name.endswith("weight")
            path = re.sub(r"layer/(\d+)", r"layer_\1", name.replace(".", "/"))
            yield path.replace("/weight", "/kernel"), value.T if turned else value


def test_a_tensorflow_1_checkpoint_agrees(reference, tokenizer, tmp_path):
    import tensorflow as tf

    model, ours = reference
    if ours.config.hidden_act != "gelu_new":
        pytest.skip("Google's code has the tanh form only")
    tensors = {name: value.detach().numpy() for name, value in model.named_parameters()}
    variables = dict(google_names(tensors))
    assert "bert/encoder/layer_2/attention/self/query/kernel" in variables
    kinds = ("adam_m", "Momentum")
    slots = {f"{name}/{slot}": value for name, value in variables.items() for slot in kinds}
    saved = variables | slots | {"global_step": np.int64(7)}
    tf.raw_ops.SaveV2(
        prefix=str(tmp_path / "bert_model.ckpt"),
        tensor_names=list(saved),
        shape_and_slices=[""] * len(saved),
        tensors=[tf.constant(value) for value in saved.values()],
    )
    settings = {theirs: getattr(ours.config, name) for name, theirs in convert.SETTING_NAMES.items()}
    settings = {name: value for name, value in settings.items() if name != "layer_norm_eps"}
    (tmp_path / "bert_config.json").write_text(json.dumps(settings | {"hidden_act": "gelu"}))
    tokenizer.save(tmp_path)
    for path in (tmp_path, tmp_path / "bert_model.ckpt", tmp_path / "bert_model.ckpt.index"):
        found = convert.load_model(str(path))
        assert found.config == ours.config
        assert found.ignored == (f"{2 * len(variables) + 1} variables of the optimizer",)
        for name, value in named_leaves(ours.params).items():
            np.testing.assert_array_equal(named_leaves(found.params)[name], value, err_msg=name)
    data = next(tmp_path.glob("*.data-*"))
    for size in (data.stat().st_size // 4, 0):  # the slots come last
        os.truncate(data, size)
        with pytest.raises(CheckpointError, match="cannot be read as a TensorFlow checkpoint"):
            convert.load_model(str(tmp_path))
