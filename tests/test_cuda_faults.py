"""Faults of the CUDA path that show without a GPU: graphs and their memory, with stand-ins for
torch.cuda; shapes and dtypes of the products; what is planned for a batch against what it takes."""

import contextlib
import gc
import itertools
import types

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import common
import model as network
from data import problems
from helpers import small_model
from model import Layout, Model, ModelConfig, Sampler, Step, log_probs, weighted_nll

VOCAB, PADDED, END = 37, 64, 0
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [16, 17], [18, 19, 20]]
PREFIX = [21, 22, 23, 24, 25]


@pytest.fixture(scope="module")
def model():
    made = small_model(VOCAB, PADDED)
    made.head.weight.data *= 0.3
    return made


# ---- graphs


def refuse(tensor):
    raise AssertionError("a value on the device is asked for in a capture")


class Graph:
    """In place of torch.cuda.CUDAGraph. What is decoded between the begin and the end of a capture
    is recorded and not run; a replay runs it. A pool keeps the rule of PyTorch 2.11: once the last
    graph that used it is gone, it must not be captured into again."""

    pools = itertools.count()
    uses = {}  # pool -> graphs that live in it
    collected = None  # whether garbage would be collected in a capture
    replays = 0

    def capture_begin(self, pool):
        assert Graph.uses.get(pool) != 0, "use_count > 0 INTERNAL ASSERT FAILED"
        Graph.uses[pool] = Graph.uses.get(pool, 0) + 1
        Graph.collected = Graph.collected or gc.isenabled()
        self.pool = pool
        self.real = Sampler._decode
        Sampler._decode = self.record

    def record(self, step):
        self.step = step

    def capture_end(self):
        Sampler._decode = self.real

    def replay(self):
        Graph.replays += 1
        with pytest.MonkeyPatch.context() as patch:  # a graph cannot ask for a number
            for ask in ("__int__", "__bool__", "item", "tolist"):
                patch.setattr(torch.Tensor, ask, refuse)
            self.real(self.sampler, self.step)

    def __del__(self):
        Graph.uses[self.pool] -= 1


@pytest.fixture()
def captured(monkeypatch):
    """A function that makes a sampler capture, on the CPU."""

    @contextlib.contextmanager
    def graph(graph, pool):  # as torch.cuda.graph does it
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        graph.capture_begin(pool)
        yield
        graph.capture_end()

    emptied = []
    pools = []

    def new_pool():
        pools.append(next(Graph.pools))
        return pools[-1]

    monkeypatch.setattr(Graph, "replays", 0)
    monkeypatch.setattr(Graph, "collected", None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", new_pool)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))

    def switch_on(sampler):
        monkeypatch.setattr(Graph, "sampler", sampler, raising=False)
        sampler.capture = True
        return sampler

    yield switch_on
    assert len(emptied) == len(pools), "unused memory is handed back for a new pool alone"


def graphs(sampler):
    return [graph for graph in sampler.graphs.values() if graph is not None]


def same(one, other):
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("prefix", [(), PREFIX])
def test_captured_steps_equal_plain_ones(model, captured, prefix):
    """A step is run once, recorded the second time, then replayed; two calls share their graphs;
    another prefix drops them.
    """
    request = PROMPTS, 20, 24, range(100), [END, 1, 2], 1.0, prefix
    plain = Sampler(model)(*request)
    sampler = captured(Sampler(model))
    same(sampler(*request), plain)
    assert len(graphs(sampler)) > 2
    same(sampler(*request), plain)
    assert len(graphs(sampler)) == len(sampler.graphs)
    assert Graph.replays > 30
    sampler(PROMPTS, 1, 24, range(5), [END], 1.0, PREFIX[:3])
    assert all(step.prefix == 3 for step in sampler.graphs)


def larger(sampler):
    sampler(PROMPTS, 8, 40, range(40), [99])


def another_prefix(sampler):
    sampler(PROMPTS, 4, 24, range(20), [99], 1.0, PREFIX)


def a_failed_capture(sampler):
    """The first one into a pool: no graph is left to keep the pool alive."""
    sampler.graphs = dict.fromkeys(sampler.graphs)
    begin = Graph.capture_begin

    def fail(graph, pool):
        begin(graph, pool)
        Sampler._decode = None  # calling it is a TypeError; the end of the capture puts it back

    Graph.capture_begin = fail
    try:
        with pytest.raises(TypeError):
            sampler(PROMPTS, 4, 24, range(20), [99])
    finally:
        Graph.capture_begin = begin


@pytest.mark.parametrize("change", [larger, another_prefix, a_failed_capture])
def test_a_pool_is_not_captured_into_after_its_last_graph(model, captured, change):
    """The first RL step after a validation asks for other buffers."""
    sampler = captured(Sampler(model))
    for _ in range(2):
        sampler(PROMPTS, 4, 24, range(20), [99])
    assert {graph.pool for graph in graphs(sampler)} == {sampler.pool}
    first = sampler.pool
    change(sampler)
    for _ in range(2):
        sampler(PROMPTS, 4, 24, range(20), [99])
    assert sampler.pool != first and Graph.uses[first] == 0
    assert {graph.pool for graph in graphs(sampler)} == {sampler.pool}


@pytest.mark.parametrize("enabled", [True, False])
def test_no_garbage_is_collected_in_a_capture(model, captured, enabled):
    """A graph or a tensor that is freed in the middle would make the capture invalid; afterwards
    all is as it was.
    """
    sampler = captured(Sampler(model))
    (gc.enable if enabled else gc.disable)()
    try:
        for _ in range(2):
            sampler(PROMPTS, 4, 24, range(20), [99])
        assert graphs(sampler) and Graph.collected is False
        assert gc.isenabled() == enabled
    finally:
        gc.enable()


# ---- attention


def test_attention_that_plans_for_each_length_is_off():
    """That of cuDNN; the others stay on."""
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert (
        torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()
    )


# ---- the head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", [0, 27])
def test_gradients_where_products_give_fp32_sums(monkeypatch, dtype, padding):
    """CUDA without Triton, where torch.mm and torch.addmm have an out_dtype that a CPU has not: the
    stand-ins compute in fp32 and ask for the same shapes.
    """
    mm, addmm = torch.mm, torch.addmm

    def wide_mm(a, b, *, out=None, out_dtype=None):
        return mm(a.to(out_dtype), b.to(out_dtype)) if out_dtype else mm(a, b, out=out)

    def wide_addmm(c, a, b, *, out_dtype, out):
        assert c.shape == out.shape == (a.shape[0], b.shape[1])
        return addmm(c, a.to(out_dtype), b.to(out_dtype), out=out)

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(150, 8, generator=generator).to(dtype).requires_grad_()
    head = torch.randn(VOCAB + padding, 8, generator=generator).requires_grad_()
    target = torch.randint(VOCAB, (150,), generator=generator)
    weight = torch.randn(150, generator=generator)

    def gradients():
        loss = weighted_nll(hidden, head, target, weight, VOCAB)[0]
        logp, entropy = log_probs(hidden, head, target, VOCAB)
        return torch.autograd.grad(loss + (logp * weight + entropy).sum(), (hidden, head))

    monkeypatch.setattr(network, "CHUNK", 1)  # three chunks
    expected = gradients()
    monkeypatch.setattr(network, "sums_in_fp32", lambda x: True)
    monkeypatch.setattr(torch, "mm", wide_mm)
    monkeypatch.setattr(torch, "addmm", wide_addmm)
    found = gradients()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=2e-2)
    assert not found[1][VOCAB:].any()


@pytest.mark.parametrize("padded", [True, False])
def test_the_sampler_multiplies_with_the_padded_head_on_cuda(monkeypatch, padded):
    """Rows of 37 numbers in bf16 do not begin at multiples of 16 bytes. The padding is never drawn,
    whatever its weights.
    """
    model = small_model(VOCAB, PADDED, torch.float32)
    model.compute = torch.bfloat16
    model.head.weight.data[VOCAB:] = 1e3
    sampler = Sampler(model)
    sampler.padded = padded
    products = []
    real = torch.Tensor.__matmul__

    def watched(a, b):
        products.append(real(a, b))
        return products[-1]

    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    logits = sampler.logits(x)
    monkeypatch.undo()
    (product,) = products
    assert (product.stride(0) * product.itemsize % 16 == 0) == padded
    torch.testing.assert_close(logits, x @ model.head.weight[:VOCAB].bfloat16().T)
    samples = sampler(PROMPTS, 4, 24, range(20), [99])
    assert int(samples.tokens.max()) < VOCAB
    assert torch.isfinite(samples.logp).all() and torch.isfinite(samples.logp_1).all()


# ---- memory


def peak(function) -> int:
    """Bytes that the function holds at most, PyTorch's inner copies included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        result = function()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    del result
    return max(itertools.accumulate(sizes))


def network_of(dtype, **shape):
    sizes = dict(layers=2, width=64, heads=4, ffn=128, vocab=100, padded_vocab=128, context=2048)
    weights = torch.float64 if dtype == torch.float64 else torch.float32
    return Model(ModelConfig(**sizes | shape), dtype).init_weights(0).to(weights)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_a_draw_takes_16_bytes_a_row_and_id(dtype, temperature, padded):
    sampler = Sampler(network_of(dtype, vocab=20_000, padded_vocab=20_032))
    sampler.padded = padded
    sampler._reserve(0, 64, 2, 24, 24)
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    step = Step(
        rows=64, max_new=16, columns=8, prompt=16, prefix=0, temperature=temperature, ends=(END,)
    )
    with torch.inference_mode():
        taken = peak(lambda: sampler._draw(x, slice(0, 64), step)) / 64 / 20_032
    assert 15.9 < taken < 16.2


LONG_PROMPT = dict(n=1, prompt=1000, max_new=20, prefix=0)
CASES = {
    "the draw": (
        dict(vocab=20_000, padded_vocab=20_032),
        dict(n=16, prompt=10, max_new=64, prefix=0),
    ),
    "the cache": ({}, dict(n=16, prompt=10, max_new=100, prefix=0)),
    "prompts of many answers": ({}, dict(n=16, prompt=200, max_new=20, prefix=0)),
    "the prefill": (dict(layers=8, width=128, ffn=512), LONG_PROMPT),
    "the prefill after a prefix": ({}, dict(n=2, prompt=500, max_new=20, prefix=300)),
    "a long prefix": ({}, dict(n=1, prompt=10, max_new=20, prefix=1500)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_what_is_planned_for_a_batch_is_what_it_takes(case, dtype):
    """Named after what takes the most."""
    shape, sizes = CASES[case]
    sampler = Sampler(network_of(dtype, **shape))
    prefix = [7] * sizes["prefix"]
    with torch.inference_mode():
        sampler._use_prefix(tuple(prefix))
    prompts = [[5] * sizes["prompt"]] * 4
    n, max_new = sizes["n"], sizes["max_new"]
    taken = peak(lambda: sampler(prompts, n, max_new, range(4 * n), [99_999], prefix=prefix))
    assert 0.95 < sampler._bytes(4, **sizes) / taken < 1.2


def test_graphs_have_memory_of_their_own():
    """The first run of a step takes its memory from elsewhere. Compiled, products are not kept."""
    sampler = Sampler(network_of(torch.float32, vocab=20_000, padded_vocab=20_032))
    plain = sampler._bytes(1, 16, 10, 64, 0)
    sampler.capture = True
    scratch = 16 * (16 * 20_032 + 8 * (128 + 4 * 64))
    assert sampler._bytes(1, 16, 10, 64, 0) == plain + scratch


MIB = 1 << 20


def system(root, files: dict) -> float:
    """What free_bytes finds, in MiB, where the files of the system are these."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return network.free_bytes(torch.device("cpu"), str(root)) / MIB


MACHINE = {"proc/meminfo": f"MemTotal: 9999999 kB\nMemAvailable:   {8000 * 1024} kB\n"}
TWO = "sys/fs/cgroup/"
ONE = "sys/fs/cgroup/memory/"
UNLIMITED_1 = "9223372036854771712"


def version_2(folder, limit, used, files=0):
    """The files of a control group of version 2, sizes in MiB."""
    return {
        f"{TWO}{folder}memory.max": f"{limit if limit == 'max' else limit * MIB}\n",
        f"{TWO}{folder}memory.current": f"{used * MIB}\n",
        f"{TWO}{folder}memory.stat": f"anon 7\ninactive_file {files * MIB}\nactive_file 3\n",
    }


def version_1(folder, limit, used, files=0):
    limit = limit if limit == UNLIMITED_1 else limit * MIB
    return {
        f"{ONE}{folder}memory.limit_in_bytes": f"{limit}\n",
        f"{ONE}{folder}memory.usage_in_bytes": f"{used * MIB}\n",
        f"{ONE}{folder}memory.stat": f"inactive_file 5\ntotal_inactive_file {files * MIB}\n",
    }


def group(line):
    return {"proc/self/cgroup": line + "\n"}


# name: files beside the machine's, what is left in MiB
CONTAINERS = {
    "no groups": ({}, 8000),
    "2, a container": (group("0::/") | version_2("", 2000, 500, 100), 1600),
    "2, no limit": (group("0::/") | version_2("", "max", 500), 8000),
    "2, a job": (group("0::/jobs/7") | version_2("jobs/7/", 3000, 1000), 2000),
    "2, a limit above the job": (
        group("0::/jobs/7") | version_2("jobs/7/", "max", 1000) | version_2("jobs/", 1500, 1200),
        300,
    ),
    "2, more in use than allowed": (group("0::/") | version_2("", 2000, 2100), 0),
    "2, a group outside of what is seen": (group("0::/../a") | version_2("", 2000, 500), 1500),
    "1, a container": (group("4:memory:/docker/c0ffee") | version_1("", 2000, 500, 300), 1800),
    "1, a job": (group("5:cpu,memory:/jobs/a b") | version_1("jobs/a b/", 900, 100), 800),
    "1, no limit": (group("4:memory:/") | version_1("", UNLIMITED_1, 500), 8000),
    "1, the memory of others": (group("3:cpu:/x\n4:memory:/") | version_1("x/", 10, 1), 8000),
    "both": (
        group("4:memory:/\n0::/") | version_1("", 2500, 500) | version_2("", "max", 100),
        2000,
    ),
    "larger than the machine": (group("0::/") | version_2("", 64000, 500), 8000),
    "files that hold nothing": (group("0::/") | {f"{TWO}memory.max": ""}, 8000),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_memory_limits_of_a_container_count(tmp_path, name):
    """The machine may have more than the container may take."""
    files, left = CONTAINERS[name]
    assert system(tmp_path, MACHINE | files) == left


def test_no_limit_where_the_system_says_nothing(tmp_path):
    assert system(tmp_path, {}) == float("inf")


# ---- rows that hold more than one sequence


def layout_of(rows, length):
    """Two documents a row, each a trunk and two branches."""
    place = torch.arange(length).expand(rows, length).contiguous()
    half = length // 2
    return Layout(place, (place >= half).long(), (place % half * 3 // half).clamp(max=2))


def hidden_of(model, rows, length):
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(VOCAB, (rows, length), generator=generator)
    return model.hidden(ids, layout_of(rows, length))


def test_flex_attention_is_used_in_compiled_blocks_on_cuda_alone():
    """Uncompiled it holds all scores; in fp64 Triton has no product."""
    model = small_model(VOCAB, PADDED)
    cuda = types.SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    assert not model.takes_blocks(cuda)
    common.compile_blocks(model)
    assert model.takes_blocks(cuda)
    assert not model.takes_blocks(types.SimpleNamespace(is_cuda=True, dtype=torch.float64))
    assert not model.takes_blocks(torch.zeros(1))


@pytest.fixture()
def by_blocks(monkeypatch):
    """A model whose compiled blocks take FlexAttention on a CPU, by a compiler that generates no
    code, and that may go backward through it."""
    torch._dynamo.reset()
    monkeypatch.setattr(network.flex, "_validate_device", lambda *tensors: None)
    model = small_model(VOCAB, PADDED, torch.float32, context=2048)
    for block in model.blocks:
        block.compile(dynamic=True, backend="aot_eager")
    model.takes_blocks = lambda x: True
    yield model
    torch._dynamo.reset()


def test_other_lengths_and_other_masks_are_no_new_code(by_blocks):
    """Each step of RL has another mask and mostly another length; one row, and one block of 128,
    are codes of their own."""
    plain = small_model(VOCAB, PADDED, torch.float32, context=2048)
    counters = torch._dynamo.utils.counters["stats"]
    counts = []
    with torch.no_grad():
        for rows, length in ((3, 200), (3, 208), (5, 320), (2, 640), (4, 136), (7, 1040)):
            found = hidden_of(by_blocks, rows, length)
            expected = hidden_of(plain, rows, length)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
            counts.append(counters["unique_graphs"])
        assert counts[0] == counts[-1]
        for rows, length in ((7, 128), (1, 256), (1, 64), (3, 72), (1, 300), (2, 100)):
            hidden_of(by_blocks, rows, length)
        assert counters["unique_graphs"] <= counts[0] + 3


def test_gradients_through_blocks_are_those_of_the_dense_mask(by_blocks):
    plain = small_model(VOCAB, PADDED, torch.float32, context=2048)
    for model in (plain, by_blocks):
        states = hidden_of(model, 2, 264)
        (states * torch.arange(states.shape[-1])).sum().backward()
    for name, p in plain.blocks.named_parameters():
        found = by_blocks.blocks.get_parameter(name).grad
        assert float((found - p.grad).norm()) < 1e-4 * float(p.grad.norm()), name


def test_all_codes_of_the_blocks_fit_the_limit_of_recompilations():
    """PyTorch's is eight; beyond it the blocks run as they are."""
    common.compile_blocks(small_model(VOCAB, PADDED))
    assert torch._dynamo.config.recompile_limit >= 64


# ---- waits for the GPU


def test_a_batch_goes_to_the_gpu_once_and_not_part_by_part(monkeypatch):
    """Each copy from ordinary memory waits for what the GPU is doing."""
    answers = [[1] * n for n in range(1, 13)]
    prompts = [[5, 6, 7]] * 12
    batch = problems.make_batch(prompts, answers, [1.0] * 12, 0, None, 2)
    copies = []
    real = torch.Tensor.to

    def watched(x, *args, **kwargs):
        copies.append(args)
        return real(x, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", watched)
    world = common.World(0, 1, torch.device("cpu"), torch.float32)
    parts = list(problems.micro_batches(batch, 4, world))
    assert len(parts) == 3
    assert len(copies) == 9  # five tensors, three of the layout, the order of the rows
    assert sum(int(part.mask.sum()) for part in parts) == sum(map(len, answers))
