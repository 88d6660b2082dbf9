"""Meta's HSTU, imported: logits and gradients of their own code, and everything else refused by name.

``meta.safetensors`` was made by Meta's code (`make_meta_reference.py`), ``rectools.safetensors`` by RecTools' layers,
which equal it (`make_rectools_reference.py`).

Shape suffixes: T tokens of all sequences together, I items, D width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lightning_gr.importers.gin_settings import read_gin
from lightning_gr.importers.meta_hstu import ITEMS, MASK, POSITIONS, check_settings, convert, read_state_dict
from lightning_gr.layers import HSTUEncoder
from lightning_gr.ops.backend import Backend, use_backend
from lightning_gr.ops.interval_mask import IntervalMask
from lightning_gr.ops.jagged import JaggedLayout
from tests.importers.reference_model import (
    BUCKETS,
    DIM,
    HEADS,
    LAYERS,
    LENGTHS,
    LONGEST,
    QK_DIM,
    V_DIM,
    Reference,
    cotangents,
    read,
)

HERE = Path(__file__).parent
FIRST = "_hstu._attention_layers.0."


def weights() -> dict[str, Tensor]:
    return dict(read(HERE / "meta.safetensors").weights)


def our_logits(reference: Reference, dtype: torch.dtype, backend: Backend) -> tuple[Tensor, HSTUEncoder, Tensor]:
    """Logits (T, I) of all items after every token, the encoder, and the item table."""
    imported = convert(reference.weights, num_heads=HEADS)
    encoder = HSTUEncoder(**imported.encoder).to(dtype).eval()
    encoder.load_state_dict(imported.encoder_weights)
    items_ID = imported.items_ID.to(dtype).requires_grad_()
    layout = JaggedLayout.from_lengths(torch.tensor(LENGTHS))
    with use_backend(backend):
        states_TD = encoder(
            items_ID[reference.items_T - 1] * DIM**0.5,  # as RetrievalModule does
            layout=layout,
            mask=IntervalMask.causal(layout),
            times_T=reference.times_T,
            request_times_T=reference.asked_T,
        )
    return F.normalize(states_TD, dim=-1) @ F.normalize(items_ID, dim=-1).T, encoder, items_ID


@pytest.mark.parametrize("source", ["meta", "rectools"])
@pytest.mark.parametrize(
    ("dtype", "backend", "atol"),
    [(torch.float64, "reference", 1e-12), (torch.float64, "cpu", 1e-12), (torch.float32, "cpu", 1e-5)],
)
def test_logits_are_those_of_the_code_that_the_weights_are_from(
    source: str, dtype: torch.dtype, backend: Backend, atol: float
) -> None:
    reference = read(HERE / f"{source}.safetensors")
    logits_TI, _, _ = our_logits(reference, dtype, backend)
    assert float(reference.logits_TI.std()) > 0.1
    torch.testing.assert_close(logits_TI.double(), reference.logits_TI, rtol=0, atol=atol)


@pytest.mark.parametrize("source", ["meta", "rectools"])
def test_gradients_are_those_of_the_code_that_the_weights_are_from(source: str) -> None:
    reference = read(HERE / f"{source}.safetensors")
    logits_TI, encoder, items_ID = our_logits(reference, torch.float64, "cpu")
    (logits_TI * cotangents()).sum().backward()
    own = {name: parameter.grad for name, parameter in encoder.named_parameters()}
    found: dict[str, Any] = {ITEMS: items_ID.grad, POSITIONS: own["position_PD"]}
    for i in range(LAYERS):
        layer = f"_hstu._attention_layers.{i}."
        uvqk = own[f"layers.{i}.uvqk.weight"]
        assert uvqk is not None
        found |= {f"{layer}_uvqk": uvqk.T, f"{layer}_o.weight": own[f"layers.{i}.output.weight"]}
        found |= {f"{layer}_o.bias": own[f"layers.{i}.output.bias"]}
        for theirs, name in (("_ts_w", "time_table_NH"), ("_pos_w", "position_table_PH")):
            table = own[f"layers.{i}.{name}"]
            assert table is not None
            found[f"{layer}_rel_attn_bias.{theirs}"] = table[:, 0]
    assert reference.gradients.keys() == found.keys()
    for name, gradient in reference.gradients.items():
        wanted = gradient[1:] if name == ITEMS else gradient
        assert float(wanted.norm()) > 1e-3
        torch.testing.assert_close(found[name], wanted, rtol=1e-9, atol=1e-11, msg=name)


def test_every_weight_matters_to_the_reference() -> None:
    reference = read(HERE / "meta.safetensors")
    for name in set(reference.weights) - {MASK}:
        changed = {**reference.weights, name: reference.weights[name] * 1.01}
        logits_TI, _, _ = our_logits(
            Reference(changed, {}, reference.items_T, reference.times_T, reference.logits_TI), torch.float64, "cpu"
        )
        assert float((logits_TI - reference.logits_TI).detach().abs().max()) > 1e-7, name


def test_the_encoder_is_told_what_the_weights_say() -> None:
    encoder = convert(weights(), num_heads=HEADS).encoder
    wanted = {"dim": DIM, "num_layers": LAYERS, "num_heads": HEADS, "qk_dim": QK_DIM, "v_dim": V_DIM}
    wanted |= {"max_length": LONGEST, "time_buckets": BUCKETS, "alpha": 1.0, "affine": False}
    assert {name: encoder[name] for name in wanted} == wanted


# ---- what is refused -----------------------------------------------------------------------------------------------


def without(name: str) -> dict[str, Tensor]:
    return {key: value for key, value in weights().items() if key != name}


@pytest.mark.parametrize(
    ("state", "named"),
    [
        (lambda: without(ITEMS), ITEMS),
        (lambda: without(f"{FIRST}_o.bias"), "_o.bias: missing"),
        (lambda: without(f"{FIRST}_rel_attn_bias._pos_w"), "_pos_w: missing"),
        (lambda: weights() | {"_ndp_module.w": torch.zeros(1)}, "_ndp_module.w: a learned similarity"),
        (lambda: weights() | {f"{FIRST}_gate": torch.zeros(1)}, "_gate: missing|_gate: unknown"),
        (lambda: weights() | {POSITIONS: torch.zeros(LONGEST, DIM + 1)}, "_pos_emb.weight: has shape"),
        (lambda: weights() | {f"{FIRST}_o.bias": torch.zeros(DIM + 1)}, "_o.bias: has shape"),
        (lambda: weights() | {f"{FIRST}_o.weight": torch.zeros(DIM, 3 * HEADS * V_DIM)}, "concat_ua"),
        (lambda: weights() | {f"{FIRST}_rel_attn_bias._pos_w": torch.zeros(9)}, "_pos_w: has shape"),
        (lambda: weights() | {MASK: torch.zeros(LONGEST, LONGEST, dtype=torch.bool)}, "_attn_mask: is not causal"),
        (lambda: weights() | {f"{FIRST}_o.bias": torch.full((DIM,), torch.nan)}, "_o.bias: .*not finite"),
        (lambda: weights() | {f"{FIRST}_o.bias": torch.zeros(DIM, dtype=torch.int64)}, "_o.bias: holds torch.int64"),
        (lambda: {ITEMS: torch.zeros(3, 2), POSITIONS: torch.zeros(3, 2)}, "_attention_layers: found"),
        (lambda: {k.replace("layers.1", "layers.2"): v for k, v in weights().items()}, r"found \[0, 2\]"),
    ],
)
def test_a_state_dict_of_another_model_is_refused_by_name(state: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        convert(state(), num_heads=HEADS)


def test_heads_that_do_not_divide_the_widths_are_refused() -> None:
    with pytest.raises(ValueError, match="num_heads=4: queries are 6 wide"):
        convert(weights(), num_heads=4)
    with pytest.raises(ValueError, match="num_heads=0"):
        convert(weights(), num_heads=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train_fn.user_embedding_norm", "layer_norm"),
        ("train_fn.item_l2_norm", False),
        ("train_fn.main_module", "SASRec"),
        ("train_fn.interaction_module_type", "MoL"),
        ("hstu_encoder.concat_ua", True),
        ("hstu_encoder.linear_activation", "none"),
        ("hstu_encoder.normalization", "softmax_rel_bias"),
        ("hstu_encoder.enable_relative_attention_bias", False),
    ],
)
def test_settings_under_which_logits_would_differ_are_refused(name: str, value: Any) -> None:
    check_settings({"train_fn.item_l2_norm": True})
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        convert(weights(), num_heads=HEADS, settings={name: value})


@pytest.mark.parametrize("name", ["num_blocks", "dqk", "dv"])
def test_a_gin_file_of_another_model_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"hstu_encoder.{name}=64"):
        convert(weights(), num_heads=HEADS, settings={f"hstu_encoder.{name}": 64})


def test_checkpoints_of_the_trainer_and_wrapped_models_are_read(tmp_path: Path) -> None:
    for i, prefix in enumerate(["", "module.", "module._orig_mod."]):
        state = {f"{prefix}{name}": value for name, value in weights().items()}
        content = state if i == 0 else {"epoch": 3, "model_state_dict": state, "optimizer_state_dict": {"state": {}}}
        torch.save(content, tmp_path / f"{i}.pt")
        assert read_state_dict(tmp_path / f"{i}.pt").keys() == weights().keys()


class Evil:
    """What runs code where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_nothing_is_unpickled_but_tensors(tmp_path: Path) -> None:
    torch.save({"model_state_dict": weights(), "more": Evil(tmp_path / "ran")}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="not unpickled"):
        read_state_dict(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_files_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        read_state_dict(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    torch.save([1], tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "epoch.pt")
    for name in ("text.pt", "list.pt", "epoch.pt"):
        with pytest.raises(ValueError, match=name):
            read_state_dict(tmp_path / name)


def test_a_gin_file_gives_its_literals_and_runs_nothing(tmp_path: Path) -> None:
    file = tmp_path / "run.gin"
    file.write_text(
        '# a comment\n\ntrain_fn.dataset_name = "ml-1m"\nhstu_encoder.dqk = 25  # wide\ntrain_fn.lr = 1e-3\n'
    )
    assert read_gin(file) == {"train_fn.dataset_name": "ml-1m", "hstu_encoder.dqk": 25, "train_fn.lr": 1e-3}
    for line in ("import os", "include 'x.gin'", "a.b = %macro", "a.b = @f()", "a.b = __import__('os')", "a.b ="):
        file.write_text(f"a.c = 1\n{line}\n")
        with pytest.raises(ValueError, match="line 2"):
            read_gin(file)


def test_rectools_says_today_what_its_file_says() -> None:
    pytest.importorskip("rectools.models.nn.transformers.hstu", exc_type=ImportError)
    from tests.importers.make_rectools_reference import reference

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        live, kept = reference(), read(HERE / "rectools.safetensors")
    finally:
        torch.set_default_dtype(before)
    torch.testing.assert_close(live.logits_TI.detach(), kept.logits_TI, rtol=0, atol=1e-12)
    assert all(torch.equal(live.weights[name], kept.weights[name]) for name in kept.weights)
