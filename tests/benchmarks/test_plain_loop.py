"""The plain loop trains the model that lightning-gr trains: equal states, losses and gradients, the same tokens."""

import pytest
import torch
from plain_loop import PlainHSTU, examples, optimizers, padded_batches, read_sequences, recall, train_epoch

from lightning_gr.layers import HSTUEncoder
from lightning_gr.ops.backend import use_backend
from lightning_gr.ops.full_softmax import full_softmax_loss
from lightning_gr.ops.interval_mask import IntervalMask
from lightning_gr.ops.jagged import JaggedLayout

SIZES = {"dim": 8, "num_layers": 2, "num_heads": 2, "max_length": 9, "dropout": 0.0}


def make(num_items=20, dropout=0.0, seed=0):
    torch.manual_seed(seed)
    return PlainHSTU(num_items=num_items, temperature=0.1, **(SIZES | {"dropout": dropout}))


def sequences(count=40, num_items=20, longest=14):
    lengths = torch.randint(1, longest, (count,), generator=torch.Generator().manual_seed(1)).tolist()
    # The next item follows from the one before, so that there is something to learn.
    return [(torch.arange(length) * 3 + user) % num_items for user, length in enumerate(lengths)]


def test_states_losses_and_gradients_are_those_of_the_jagged_encoder_and_the_fused_loss():
    model = make().double()
    encoder = HSTUEncoder(**SIZES, time_bias=False, position_bias="recency").double()
    encoder.load_state_dict(model.encoder.state_dict())
    train, _ = examples(sequences(), SIZES["max_length"])
    ((history_BL, target_BL),) = padded_batches(train, 10_000)
    model(history_BL, target_BL).backward()

    items_ID = model.items.weight.detach().clone().requires_grad_()
    asked_BL = target_BL >= 0
    layout = JaggedLayout.from_lengths(asked_BL.sum(1))
    x_TD = items_ID[history_BL[asked_BL]] * SIZES["dim"] ** 0.5
    with use_backend("reference"):
        states_TD = encoder(x_TD, layout=layout, mask=IntervalMask.causal(layout))
    unit_TD, unit_ID = (torch.nn.functional.normalize(x, dim=-1) for x in (states_TD, items_ID))
    loss = full_softmax_loss(unit_TD, unit_ID, targets_T=target_BL[asked_BL], temperature=0.1).mean()
    loss.backward()
    torch.testing.assert_close(loss, model(history_BL, target_BL))
    torch.testing.assert_close(items_ID.grad, model.items.weight.grad)
    others = dict(encoder.named_parameters())
    assert others.keys() == dict(model.encoder.named_parameters()).keys()
    for name, parameter in model.encoder.named_parameters():
        torch.testing.assert_close(parameter.grad, others[name].grad, msg=name)


def test_the_last_item_is_the_test_and_the_one_before_it_is_not_trained_either():
    train, test = examples([torch.arange(12), torch.arange(3), torch.arange(2), torch.arange(4)], 5)
    assert [(x.tolist(), y.tolist()) for x, y in train] == [([4, 5, 6, 7, 8], [5, 6, 7, 8, 9]), ([0], [1])]
    assert [(x.tolist(), y.tolist()) for x, y in test] == [
        ([6, 7, 8, 9, 10], [-1, -1, -1, -1, 11]),
        ([0, 1], [-1, 2]),
        ([0, 1, 2], [-1, -1, 3]),
    ]


def test_batches_have_every_token_once_within_the_budget_and_little_padding():
    train, _ = examples(sequences(200), SIZES["max_length"])
    batches = list(padded_batches(train, 50))
    found = sorted(y[y >= 0].tolist() for _, targets in batches for y in targets)
    assert found == sorted(y.tolist() for _, y in train)
    assert max(int((y >= 0).sum()) for _, y in batches) <= 50
    assert sum(y.numel() for _, y in batches) < 1.15 * sum(len(x) for x, _ in train)


@pytest.mark.parametrize("table", ["adamw", "adagrad"])
def test_the_loop_learns_what_follows_what(table):
    train, test = examples(sequences(200), SIZES["max_length"])
    model = make(dropout=0.1)
    before = recall(model, test, k=1)
    step_with = optimizers(model, table, lr=0.02, table_lr=0.1)
    losses = [train_epoch(model, train, 100, step_with)[1] for _ in range(6)]
    assert losses[-1] < 0.5 * losses[0]
    assert recall(model, test, k=1) > before + 0.5


def test_recall_counts_ties_against_the_model():
    model = make()
    torch.nn.init.ones_(model.items.weight)  # all logits are equal
    _, test = examples(sequences(), SIZES["max_length"])
    assert recall(model, test, k=19) == 0
    assert recall(model, test, k=20) == 1


def test_a_log_is_read_with_items_numbered_in_the_order_of_their_ids(tmp_path):
    (tmp_path / "log.txt").write_text("1 30 10\n2 20 30 500\n")
    assert [x.tolist() for x in read_sequences(tmp_path / "log.txt")] == [[2, 0], [1, 2, 3]]
