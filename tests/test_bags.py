"Weighted sums of a table's rows, and their gradients"
import pytest, torch, torch.nn.functional as F
from torch.autograd import gradcheck
from deqdet.ops.bags import reads_of, table_grad, weight_grad, weighted_sums

def given(kind=torch.float64, n=40, K=5, S=23, C=6):
    torch.manual_seed(0)
    rows = torch.randint(S, (n, K), dtype=torch.int32)
    return rows, torch.randn(S, C, dtype=kind, requires_grad=True), torch.randn(n, K, dtype=kind, requires_grad=True)

def plain(rows, table, weight): return (table[rows.long()]*weight[..., None]).sum(1)

def test_reads_lie_row_after_row():
    order, first = reads_of(torch.tensor([[3, 1, 2], [5, 3, 5]], dtype=torch.int32), 7)
    assert order.tolist() == [1, 2, 0, 4, 3, 5] and first.tolist() == [0, 0, 1, 2, 4, 4, 6]

def test_sums_and_gradients_are_those_of_plain_indexing():
    rows, table, weight = given()
    ours, theirs = weighted_sums(rows, table, weight), plain(rows, table, weight)
    torch.testing.assert_close(ours, theirs)
    v = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad(y, (table, weight), v) for y in (ours, theirs))): torch.testing.assert_close(a, b)
    assert gradcheck(lambda t, w: weighted_sums(rows, t, w), (table, weight))

def test_a_gradient_that_nobody_wants_is_not_computed(monkeypatch):
    rows, table, weight = given()
    def refuse(*_): raise AssertionError
    monkeypatch.setattr('deqdet.ops.bags.table_grad', refuse)
    weighted_sums(rows, table.detach(), weight).sum().backward()
    torch.testing.assert_close(weight.grad, table.detach().sum(1)[rows.long()])
    monkeypatch.undo()
    monkeypatch.setattr('deqdet.ops.bags.weight_grad', refuse)
    weighted_sums(rows, table, weight.detach()).sum().backward()
    assert table.grad.abs().sum() > 0

def test_gradients_that_are_not_contiguous():
    rows, table, weight = given()
    grads = [torch.autograd.grad(f(rows, table, weight).T.contiguous().T.sin().sum(), (table, weight)) for f in (weighted_sums, plain)]
    for a, b in zip(*grads): torch.testing.assert_close(a, b)
    wide = torch.randn(len(table), 2*table.shape[1], dtype=table.dtype)[:, ::2].requires_grad_()
    grads = [torch.autograd.grad(f(rows, wide, weight).sin().sum(), (wide, weight)) for f in (weighted_sums, plain)]
    for a, b in zip(*grads): torch.testing.assert_close(a, b)

def test_no_sums_and_rows_that_nobody_reads():
    rows, table, weight = given(n=0)
    out = weighted_sums(rows, table, weight)
    out.sum().backward()
    assert out.shape == (0, 6) and not table.grad.any() and weight.grad.shape == (0, 5)
    rows = torch.full((3, 2), 4, dtype=torch.int32)
    grad = table_grad(torch.ones(3, 6), rows, torch.ones(3, 2), 9)
    assert grad[4].tolist() == [6.]*6 and grad.abs().sum() == 36
    assert weight_grad(torch.ones(3, 6), rows, torch.ones(9, 6)).tolist() == [[6., 6.]]*3

@pytest.mark.parametrize('kind', [torch.float16, torch.bfloat16])
def test_half_precision_takes_pytorchs_gradients(kind):
    rows, table, weight = given(kind)
    theirs = F.embedding_bag(rows, table, per_sample_weights=weight, mode='sum')
    assert torch.equal(weighted_sums(rows, table, weight), theirs)

def test_compiled_code():
    rows, table, weight = given(torch.float32)
    fast = torch.compile(weighted_sums, backend='eager', fullgraph=True)
    torch.testing.assert_close(fast(rows, table, weight), plain(rows, table, weight))

def test_a_second_derivative_is_refused():
    rows, table, weight = given()
    grad, = torch.autograd.grad(weighted_sums(rows, table, weight).square().sum(), table, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'): grad.sum().backward()
