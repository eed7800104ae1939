from __future__ import annotations

import pytest
import torch
from support.models import forward, tiny_config

from bigpipe.bigmodel.architecture import describe_architecture
from bigpipe.bigmodel.checkpoint import open_checkpoint
from bigpipe.bigmodel.formats import PLAIN, format_of
from bigpipe.bigmodel.writing import PlannedTensor, container
from bigpipe.bigmodel.writing.synthetic import RandomTensors, SyntheticModel
from bigpipe.errors import UsageError


@pytest.fixture(scope="module")
def opt():
    config = {**tiny_config("opt").to_dict(), "architectures": ["OPTForCausalLM"]}
    return config, describe_architecture(config)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_from_pretrained_loads_a_made_up_model(tmp_path, opt, form):
    import transformers

    config, _ = opt
    saved = SyntheticModel(*opt, dtype="float32", format=form, max_shard_size="20KB").write(tmp_path)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert saved.shards > 1
    assert model.dtype == torch.float32
    assert torch.isfinite(forward(model)).all()
    weight = model.model.decoder.layers[0].fc1.weight
    assert weight.std().item() == pytest.approx(config["init_std"], rel=0.05)
    assert weight.mean().item() == pytest.approx(0, abs=0.002)
    assert torch.equal(model.model.decoder.layers[0].fc1.bias, torch.zeros(64))
    assert torch.equal(model.model.decoder.layers[0].final_layer_norm.weight, torch.ones(32))


def test_weights_depend_on_name_dtype_and_seed_alone(tmp_path, opt):
    first = SyntheticModel(*opt, seed=1, max_shard_size="20KB").write(tmp_path / "a")
    assert SyntheticModel(*opt, seed=1, max_shard_size="20KB").write(tmp_path / "b") == first
    SyntheticModel(*opt, seed=1).write(tmp_path / "c")
    SyntheticModel(*opt, seed=2).write(tmp_path / "d")
    a, c, d = (open_checkpoint(tmp_path / name) for name in "acd")
    names = [name for name in a.tensors if name.endswith("proj.weight")]
    assert all(a.read(name) == c.read(name) for name in a.tensors)
    assert not any(c.read(name) == d.read(name) for name in names)
    assert len({a.read(name) for name in names}) == len(names)


def test_what_is_made_up_is_plain_whatever_its_config_came_with(opt):
    config, architecture = opt
    packed = {**config, "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    model = SyntheticModel(packed, architecture)
    assert "quantization_config" not in (model.description.config or {})
    assert format_of(model.description) is PLAIN


def test_the_description_is_what_gets_written(tmp_path, opt):
    model = SyntheticModel(*opt, dtype="bfloat16", format="bin", max_shard_size="30KB")
    description = model.description
    saved = model.write(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in checkpoint.tensors.items()} == description.tensors
    assert checkpoint.tied == description.tied == {"lm_head.weight": "model.decoder.embed_tokens.weight"}
    assert checkpoint.config == description.config
    assert saved.bytes == sum(container(plan).size for plan in model.plans)


def test_norms_positions_and_counters_are_what_fresh_models_have():
    def made(name, dtype, shape):
        tensor = PlannedTensor(name, dtype, shape)
        return torch.frombuffer(
            bytearray(b"".join(RandomTensors(0, 0.02).produce(tensor))), dtype=getattr(torch, dtype)
        )

    assert made("embeddings.position_ids", "int64", (1, 4)).tolist() == [0, 1, 2, 3]
    assert made("bn.num_batches_tracked", "int64", ()).tolist() == [0]
    assert made("bn.running_var", "float16", (3,)).tolist() == [1, 1, 1]
    assert made("norm.weight", "bfloat16", (2,)).tolist() == [1, 1]
    assert made("fc.bias", "float32", (2,)).tolist() == [0, 0]


def test_quantized_formats_cannot_be_made_up(opt, tmp_path):
    with pytest.raises(UsageError, match="choose one of"):
        SyntheticModel(*opt, dtype="int8").write(tmp_path)
