"""What compiled steps compute otherwise than torch is the same function, about as exact."""

import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distopt.infer.capture import decompositions, inductor
from distopt.infer.capture.decompositions import STORE, Table
from distopt.infer.capture.recording import aten

SPECIAL = torch.tensor(
    [0.0, -0.0, 1e-40, -1e-40, 1e-8, 16.9, 17.0, 20.0, 20.1, 88.0, 3e38]
    + [-16.9, -20.0, -86.0, -90.0, -104.0, -3e38, torch.inf, -torch.inf, torch.nan]
)


def numbers() -> Tensor:
    torch.manual_seed(0)
    return torch.cat([torch.randn(100_000) * scale for scale in (1e-3, 0.1, 1.0, 5.0, 20.0, 100.0)])


def errors(result: Tensor, exact: Tensor) -> Tensor:
    """Returns relative errors where the exact result is a normal number, in roundings of float32."""
    is_normal = (exact.abs() > 1e-37) & exact.isfinite()
    return ((result.double() - exact).abs() / exact.abs())[is_normal] / torch.finfo(torch.float32).eps


@pytest.mark.parametrize("beta", [1.0, 0.5, 3.0])
def test_softplus_is_as_exact_as_torch(beta):
    x = numbers()
    exact = F.softplus(x.double(), beta, threshold=1e9)
    ours, theirs = errors(decompositions._softplus(x, beta), exact), errors(F.softplus(x, beta), exact)
    assert ours.max() < 2 * theirs.max()
    assert ours.square().mean() < 4 * theirs.square().mean()


def test_log_sigmoid_is_as_exact_as_torch():
    x = numbers()
    exact = F.logsigmoid(x.double())
    ours, theirs = errors(decompositions._log_sigmoid_forward(x)[0], exact), errors(F.logsigmoid(x), exact)
    assert ours.max() < 2 * theirs.max()
    assert ours.square().mean() < 4 * theirs.square().mean()


def test_special_numbers_give_what_torch_gives():
    softplus, (log_sigmoid, power) = decompositions._softplus(SPECIAL), decompositions._log_sigmoid_forward(SPECIAL)
    torch.testing.assert_close(softplus, F.softplus(SPECIAL), equal_nan=True)
    torch.testing.assert_close(log_sigmoid, F.logsigmoid(SPECIAL), equal_nan=True)
    torch.testing.assert_close(power, aten.log_sigmoid_forward(SPECIAL)[1], equal_nan=True)


@pytest.mark.parametrize(
    ("x", "options"),
    [
        (torch.ones(3, dtype=torch.float64), {}),
        (torch.ones(3), {"threshold": 5.0}),
        (torch.ones(3), {"beta": -1.0}),
        (torch.ones(3, device="meta"), {}),
    ],
)
def test_softplus_of_other_kinds_is_left_to_torch(x, options):
    assert decompositions._softplus(x, **options) is NotImplemented


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_columns", [1, 2, 3, 5, 8, 9])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_narrow_product_is_the_product(dtype, num_columns, is_transposed):
    torch.manual_seed(num_columns)
    a = torch.randn(40, 70, dtype=dtype).t() if is_transposed else torch.randn(70, 40, dtype=dtype)
    b = torch.randn(40, num_columns, dtype=dtype)
    result = decompositions._mm(a, b)
    if num_columns in (1, 9):
        assert result is NotImplemented
    else:
        torch.testing.assert_close(result, (a.double() @ b.double()).to(dtype))
        assert result.is_contiguous()  # as torch's is
        assert decompositions._mm(a, b.t().contiguous().t()) is NotImplemented  # it lies as MKL is quick with


def test_compiler_takes_them_and_its_cache_knows_the_table_by_name(monkeypatch):
    """As a dictionary of functions it could not be pickled, and each process would compile anew."""
    assert len(pickle.dumps(Table())) < 200
    assert pickle.loads(pickle.dumps(Table())).keys() == Table().keys()
    graph = torch.fx.Graph()
    graph.output((graph.call_function(aten.softplus.default, (graph.placeholder("x"),)),))
    x = torch.full((3,), -5.0)

    def run() -> Tensor:
        return inductor._run_compiler(torch.fx.GraphModule(torch.nn.Module(), graph), [torch.zeros(3)])(x)[0]

    torch.testing.assert_close(run(), F.softplus(x))
    table = Table()
    monkeypatch.setitem(table, aten.softplus.default, lambda x: x.clone())
    monkeypatch.setattr(decompositions, "Table", lambda: table)
    assert torch.equal(run(), x)  # not what the cache has of the graph with other decompositions


def test_what_is_stored_is_computed_once_and_the_same():
    x, rows = torch.randn(50), torch.randint(50, (4000,))

    def source_of(is_stored: bool) -> tuple[str, Tensor]:
        from torch._inductor.utils import run_and_get_code

        graph = torch.fx.Graph()
        values, index = graph.placeholder("x"), graph.placeholder("rows")
        effects = graph.call_function(aten.lgamma.default, (graph.call_function(aten.exp.default, (values,)),))
        if is_stored:
            effects = graph.call_function(STORE, (effects,))
        chosen = graph.call_function(aten.index.Tensor, (effects, [index]))
        graph.output((graph.call_function(aten.sum.default, (chosen,)),))

        def run() -> Tensor:
            module = torch.fx.GraphModule(torch.nn.Module(), graph)
            return inductor._run_compiler(module, [x, rows])(x, rows)[0]

        total, (source, *_) = run_and_get_code(run)
        return source, total

    (stored, total), (fused, other) = source_of(True), source_of(False)
    loops = [each for each in stored.split("for(int64_t") if "lgamma(" in each]
    assert len(loops) == 1 and "50L" in loops[0] and "4000L" not in loops[0]
    assert "4000L" in next(each for each in fused.split("for(int64_t") if "lgamma(" in each)
    torch.testing.assert_close(total, other)
    torch.testing.assert_close(total, torch.lgamma(x.exp())[rows].sum())


@pytest.mark.parametrize("columns", [(5, 2), (2, 5), (8, 8), (50, 2), (3, 1)])
def test_products_that_are_narrow_both_ways_compile(columns):
    """Turned around, a product of few columns may be one of few rows, which is narrow again."""
    num_in, num_out = columns
    x, y = torch.randn(60, num_in), torch.randn(60, num_out)
    graph = torch.fx.Graph()
    left, right = graph.placeholder("x"), graph.placeholder("y")
    turned = graph.call_function(aten.t.default, (left,))
    graph.output((graph.call_function(aten.mm.default, (turned, right)),))
    function = inductor._run_compiler(torch.fx.GraphModule(torch.nn.Module(), graph), [x, y])
    torch.testing.assert_close(function(x, y)[0], x.t() @ y)


def test_compiler_knows_what_is_stored_by_the_text_of_the_module():
    """Its cache would hand over what another version of distopt has compiled of the same graph."""
    assert decompositions.TEXT[:12] in str(STORE)
    graph = torch.fx.Graph()
    graph.output((graph.call_function(STORE, (graph.placeholder("x"),)),))
    x = torch.randn(3)
    (stored,) = inductor._run_compiler(torch.fx.GraphModule(torch.nn.Module(), graph), [x])(x)
    assert torch.equal(stored, x)
    assert stored.data_ptr() != x.data_ptr()
