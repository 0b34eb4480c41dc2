"""The CUDA kernels of the search on a GPU, beside the CPU's engine. Run by `make gpu-check`. Not yet run on a GPU.

Sums and products are the CPU's to the bit, exp and log are not: the last bit of a loss may differ, and rarely an edit
that gives an equivalent graph then passes on one side only. Whole searches are compared where no such edit occurs.
test_cuda_search_emulation.py compares all of them, with the host's exp and log.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cuda_search_cases import NAMES, SEARCHES, Search, compare, relabelling, used
from helpers import sanitize
from search_helpers import assert_simple, assert_state_is_fresh, drawn_teacher, make_graphs

from acgkd_fast import GraphBatch, _library
from acgkd_fast.distill.edge_lists import EdgeLists
from acgkd_fast.distill.refine import Refiner, RefineSettings
from acgkd_fast.teachers import as_teacher

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore:k. expected at most 0.05"),
]
OPERATOR = torch.ops.acgkd_fast.search_steps
LARGE = {
    "MUTAG": Search("gcn5-64", sizes=tuple(range(10, 30)) * 6, edited=36, steps=60),
    "COLLAB": Search("gcn5-64", sizes=(75,) * 12, degree=30.0, edited=6, steps=20),
    "REDDIT-B": Search("gcn5-64", sizes=(430, 3, 900), degree=2.0, edited=3, steps=12),
    "large rounds": Search("gin5-32", sizes=(20,) * 400, edited=400, steps=16, interval=8),
}


@pytest.fixture(scope="module", autouse=True)
def native_kernels() -> None:
    """A build without CUDA kernels must not pass for a success of the plain-torch ones."""
    assert _library.backend("search_steps", "cuda") == "native"
    assert _library.backend("search_steps", "cpu") == "native"


@pytest.mark.parametrize("arch", ["gcn3-8", "gin3-8", "gcn5-64", "gin5-64"])
@pytest.mark.parametrize("interval", [1, 7])
def test_the_same_labels_as_the_cpu_engine(arch, interval):
    search = replace(relabelling(arch), interval=interval)
    compare(OPERATOR, OPERATOR(*search.operands()), search.operands("cuda"))


@pytest.mark.parametrize("name", [*SEARCHES, *LARGE])
def test_steps_from_a_common_state(name):
    """Step by step: where the devices decide differently, the edit changes nothing but rounding."""
    search = replace({**SEARCHES, **LARGE}[name], stop_k=0.0, interval=1)
    if search.temperature > 0.0 or search.steps == 0:
        search = replace(search, temperature=0.0, steps=20)
    state, unlike, kept = None, 0, 0
    for step in range(min(search.steps, 20)):
        operands = list(replace(search, steps=1, first_step=step).operands())
        if state is not None:
            operands[:8] = state
        room = torch.zeros(len(search.sizes), 1, dtype=torch.int64)
        operands[0] = torch.cat([operands[0], room], 1)
        expected = OPERATOR(*operands)
        found = OPERATOR(*[part.cuda() if isinstance(part, torch.Tensor) else part for part in operands])
        ours, theirs = used(found), used(expected)
        torch.testing.assert_close(ours["level"], theirs["level"], rtol=1e-5, atol=1e-5)
        unlike += not torch.equal(ours["pairs"], theirs["pairs"]) or not torch.equal(ours["label"], theirs["label"])
        kept += int(theirs["progress"][1])
        state = expected[:8]
    assert unlike <= 2, (unlike, kept)


@pytest.mark.parametrize("name", [*SEARCHES, *LARGE])
def test_equal_bits_on_a_repeat(name):
    operands = {**SEARCHES, **LARGE}[name].operands("cuda")
    first, second = used(OPERATOR(*operands)), used(OPERATOR(*operands))
    for part in NAMES:
        assert torch.equal(first[part].nan_to_num(7), second[part].nan_to_num(7)), part


@pytest.mark.parametrize("name", ["MUTAG", "COLLAB", "REDDIT-B", "large rounds"])
def test_the_state_after_many_edits_is_that_of_a_forward_pass(name):
    search = replace(LARGE[name], steps=100)
    graphs = make_graphs(search.seed, search.sizes, search.degree)
    teacher = drawn_teacher(search.arch)
    on_gpu = as_teacher(teacher.module.cuda())
    graphs = GraphBatch(graphs.x.cuda(), graphs.edges.to("cuda"), graphs.y.cuda())
    refiner = Refiner(on_gpu, graphs, RefineSettings(steps=100, interval=search.interval, engine="native"), seed=3)
    refiner.advance(100)
    assert refiner.engine == "native" and refiner.accepted > 0
    assert torch.stack(refiner._trace).diff().max() <= 1e-12
    refiner.teacher = as_teacher(teacher.module.cpu())
    cpu = Refiner(refiner.teacher, make_graphs(search.seed, search.sizes, search.degree), RefineSettings(steps=100))
    cpu.load_state_dict(refiner.state_dict())
    assert_state_is_fresh(cpu)


def test_work_goes_to_the_current_stream():
    """The operands are written late on a side stream."""
    operands = list(Search(steps=5).operands("cuda"))
    expected = used(OPERATOR(*operands))
    label = operands[2]
    operands[2] = torch.full_like(label, -1)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        operands[2].copy_(label)
        found = OPERATOR(*operands)
    side.synchronize()
    assert torch.equal(used(found)["pairs"], expected["pairs"])


def test_bad_operands_are_named():
    operands = list(Search(steps=5).operands("cuda"))
    operands[9] = operands[9] + 2
    with pytest.raises(RuntimeError, match="y: expected values in 0"):
        OPERATOR(*operands)


def test_graphs_stay_simple():
    for name in ("all together", "swaps that connect", "COLLAB"):
        search = {**SEARCHES, **LARGE}[name]
        operands = search.operands("cuda")
        found = used(OPERATOR(*operands))
        ptr = operands[10].cpu()
        assert_simple(EdgeLists(found["pairs"], found["counts"]).to_edges(ptr, int(ptr[-1])), search.sizes)


SANITIZED = """
import torch
from dataclasses import replace
from cuda_search_cases import SEARCHES, Search
for name, search in SEARCHES.items():
    torch.ops.acgkd_fast.search_steps(*replace(search, steps=min(search.steps, 6)).operands("cuda"))
for search in (Search("gcn5-64", sizes=(430,), edited=1, steps=2), Search(sizes=(5,) * 200, edited=200, steps=2)):
    torch.ops.acgkd_fast.search_steps(*search.operands("cuda"))
torch.cuda.synchronize()
print("finished")
"""


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer(tool):
    sanitize(tool, SANITIZED)
