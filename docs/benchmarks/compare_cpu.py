"""Speed of megatrain on CPU as a ratio, in interleaved pairs of rounds, so that other work on the machine hits both sides.

    python docs/benchmarks/compare_cpu.py single --precision fp32                # one process, against plain PyTorch
    python docs/benchmarks/compare_cpu.py single --precision bf16 --as-people-run-it
    python docs/benchmarks/compare_cpu.py single --precision fp32 --compile      # both compiled
    python docs/benchmarks/compare_cpu.py single --precision bf16 --vocab 50304 --loss-chunk 256
    python docs/benchmarks/compare_cpu.py single --precision bf16 --shape 124m --micro-batch-size 2 --pairs 3 --steps 1
    python docs/benchmarks/compare_cpu.py single --against transformers          # Hugging Face's GPT-2 (pip install transformers)
    python docs/benchmarks/compare_cpu.py tensor-parallel --precision bf16       # tp 2 + sequence parallel, against two lone processes
    python docs/benchmarks/compare_cpu.py pipeline --micro-batches 8 --steps 1   # two stages, against two lone processes
    python docs/benchmarks/compare_cpu.py replicas --zero 1 --against ddp --micro-batch-size 2 --micro-batches 4
    python docs/benchmarks/compare_cpu.py replicas --zero 3 --against fsdp2 --micro-batch-size 2 --micro-batches 4

`single`: megatrain and plain_gpt.py (nanoGPT's design, fused AdamW; bf16 is autocast there and BF16 weights with FP32 masters
here), both with megatrain's allocator settings, or, --as-people-run-it, each as it comes; with the peak memory of each.
`tensor-parallel`: two single-thread processes that share one model, against two such processes that train one each without talking to
each other.
`pipeline`: the same with two stages (--schedule); beside it, what is to be expected: 1 less the step bubble that the simulator gives
for the measured time of each instruction.
`replicas`: two single-thread processes, each with its half of the micro-batches, at a ZeRO stage, against torch's DDP (gradients summed
once a step, fused AdamW) or FSDP2 (a layer at a time, gathered again in the backward) around plain_gpt.py; with the peak memory of a rank.
All processes live through the whole measurement and wait while it is not their turn. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

WORKERS = ("plain", "transformers", "ours", "shared", "staged", "replica", "ddp", "fsdp2")
SHAPES = {
    "8x512": {"num_layers": 8, "hidden_size": 512, "num_attention_heads": 8, "seq_length": 512, "vocab_size": 8192},
    "2x64": {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "seq_length": 64, "vocab_size": 512},
    "124m": {"num_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "seq_length": 1024, "vocab_size": 50304},
}
"""Models by name; 2x64 only shows that a command works, 124m is GPT-2's smallest, its vocabulary padded to a multiple of 128."""


class Side:
    """One program under measurement: one or several worker processes that take a step each when told."""

    def __init__(self, kind: str, processes: int, args: argparse.Namespace, tuned: bool) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.workers = []
        for rank in range(processes):
            command = [
                sys.executable,
                __file__,
                kind,
                "--precision",
                args.precision,
                "--threads",
                str(args.threads // processes),
            ]
            command += [
                "--rank",
                str(rank),
                "--size",
                str(processes),
                "--port",
                str(port),
                "--micro-batch-size",
                str(args.micro_batch_size),
                "--micro-batches",
                str(args.micro_batches),
                "--schedule",
                args.schedule,
                "--zero",
                str(args.zero),
                "--shape",
                args.shape,
                "--vocab",
                str(args.vocab),
                "--loss-chunk",
                str(args.loss_chunk),
            ]
            command += ["--compile"] if args.compile else []
            command += ["--tuned"] if tuned else []
            self.workers.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))

    def go(self, steps: int) -> float:
        """Seconds of a step, in a round of `steps` by all workers at once."""
        start = time.perf_counter()
        for worker in self.workers:
            worker.stdin.write(f"{steps}\n")
            worker.stdin.flush()
        self.answers = [worker.stdout.readline() for worker in self.workers]
        if not all(self.answers):
            raise SystemExit("a worker has died")
        return (time.perf_counter() - start) / steps

    def close(self) -> None:
        """End the workers."""
        for worker in self.workers:
            worker.stdin.close()
        for worker in self.workers:
            worker.wait()


def serve(step, answer=lambda: "done") -> None:
    """A worker: take as many steps as each line of stdin says, and answer with a line."""
    for line in sys.stdin:
        for _ in range(int(line)):
            step()
        print(answer(), flush=True)


def plain_worker(args: argparse.Namespace) -> None:
    """Plain PyTorch."""
    import plain_gpt
    import torch

    made = (
        transformers_gpt2(args)
        if args.what == "transformers"
        else plain_gpt.PlainGPT(*sides(args), args.vocab, shape_of(args)["seq_length"])
    )
    optimizer = plain_gpt.make_optimizer(made)
    model = torch.compile(made) if args.compile else made
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16")
    tokens = torch.randint(args.vocab, (args.micro_batches, args.micro_batch_size, shape_of(args)["seq_length"] + 1))
    serve(lambda: plain_gpt.train_step(model, optimizer, tokens, autocast, 1.0), peak_mebibytes)


def transformers_gpt2(args: argparse.Namespace):
    """Hugging Face's GPT-2 of the same shape, without dropout: tokens and labels [b, s] to the mean loss."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        raise SystemExit("transformers is not installed: pip install transformers") from None
    import torch

    layers, width, heads = sides(args)
    settings = {"n_layer": layers, "n_embd": width, "n_head": heads, "vocab_size": args.vocab}
    settings["n_positions"] = shape_of(args)["seq_length"]
    config = GPT2Config(
        **settings, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, attn_implementation="sdpa"
    )

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = GPT2LMHeadModel(config)

        def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            logits = self.model(tokens).logits
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    return Loss()


def peer_worker(args: argparse.Namespace) -> None:
    """Plain PyTorch in torch's own data-parallel wrapper, DDP or FSDP2, over gloo."""
    import plain_gpt
    import torch
    from torch import distributed

    rendezvous = f"tcp://127.0.0.1:{args.port}"
    distributed.init_process_group("gloo", init_method=rendezvous, rank=args.rank, world_size=args.size)
    model = plain_gpt.PlainGPT(*sides(args), args.vocab, shape_of(args)["seq_length"])
    bf16 = args.precision == "bf16"
    if args.what == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        policy = MixedPrecisionPolicy(torch.bfloat16 if bf16 else None, torch.float32 if bf16 else None)
        mesh = init_device_mesh("cpu", (args.size,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        wrapped = fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = plain_gpt.make_optimizer(model)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16 and args.what == "ddp")
    mine = args.micro_batches // args.size
    tokens = torch.randint(args.vocab, (mine, args.micro_batch_size, shape_of(args)["seq_length"] + 1))

    def wait_with_the_sum(number: int) -> contextlib.AbstractContextManager:
        return wrapped.no_sync() if args.what == "ddp" and number < mine - 1 else contextlib.nullcontext()

    serve(lambda: plain_gpt.train_step(wrapped, optimizer, tokens, autocast, 1.0, wait_with_the_sum), peak_mebibytes)


def peak_mebibytes() -> str:
    """Largest resident memory of this process so far, as JSON."""
    return json.dumps({"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024})


def shape_of(args: argparse.Namespace) -> dict[str, int]:
    """The model's shape, with the vocabulary that was asked for."""
    return {**SHAPES[args.shape], "vocab_size": args.vocab}


def sides(args: argparse.Namespace) -> tuple[int, int, int]:
    """Layers, width and heads of the model."""
    shape = SHAPES[args.shape]
    return shape["num_layers"], shape["hidden_size"], shape["num_attention_heads"]


def layout_of(args: argparse.Namespace) -> dict:
    """The parallel section of a worker."""
    if args.what == "replica":
        return {"zero_stage": args.zero}
    if args.what == "staged":
        chunks = {"interleaved": 2, "zb_v": 2}.get(args.schedule, 1)
        return {"pipeline_parallel_size": args.size, "virtual_pipeline_size": chunks, "schedule": args.schedule}
    return {"tensor_parallel_size": args.size, "sequence_parallel": True} if args.what == "shared" else {}


def our_worker(args: argparse.Namespace) -> None:
    """megatrain: alone, or one of the ranks of a tensor- and sequence-parallel (`shared`) or pipelined (`staged`) model."""
    from megatrain.assembly import assemble, mesh_shape
    from megatrain.config.schema import Config, ModelConfig, OptimConfig, ParallelConfig, TrainConfig
    from megatrain.data.loader import Loader
    from megatrain.parallel.mesh import ParallelContext
    from megatrain.runtime.distributed import connect
    from megatrain.runtime.launch import Launch
    from megatrain.testing.trace import RandomSamples
    from megatrain.training import train_step

    size = 1 if args.what == "ours" else args.size
    sequences = args.micro_batch_size * args.micro_batches
    config = Config(
        model=ModelConfig(activation="gelu", **shape_of(args)),
        parallel=ParallelConfig(**layout_of(args), device="cpu"),
        optim=OptimConfig(),
        train=TrainConfig(
            global_batch_size=sequences,
            micro_batch_size=args.micro_batch_size,
            precision=args.precision,
            compile="block" if args.compile else "none",
            loss_chunk=args.loss_chunk,
        ),
    )
    env = {
        key: str(value)
        for key, value in (("RANK", args.rank), ("LOCAL_RANK", args.rank), ("WORLD_SIZE", size), ("LOCAL_WORLD_SIZE", size))
    }
    env.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(args.port), OMP_NUM_THREADS=str(args.threads))
    session = connect(Launch.from_environment(env if size > 1 else {}), config.parallel, 120.0, env)
    ctx = ParallelContext.build(session.world, mesh_shape(config.parallel, size), session.device)
    samples = RandomSamples(args.vocab, config.model.seq_length)
    loader = Loader(samples, sequences, args.micro_batch_size, ctx.dp.rank, ctx.dp.size)
    batch = loader.build(0)
    loader.batch = lambda consumed: batch  # tokens are not what is measured here
    run = assemble(config, ctx, loader, args.vocab)
    spans: dict[str, list[float]] = {}

    def observe(instruction, start: float, end: float) -> None:
        spans.setdefault(f"{instruction.chunk} {instruction.kind}", []).append(end - start)

    run.observers.instruction = observe
    spans_or_memory = (
        peak_mebibytes
        if args.what in ("replica", "ours")
        else lambda: json.dumps({k: statistics.median(t) for k, t in spans.items()})
    )
    serve(lambda: train_step(run), spans_or_memory)


def expected_of(args: argparse.Namespace, answers: list[str]) -> float:
    """1 less the step bubble, simulated with what each instruction took on each stage."""
    from megatrain.parallel.schedules import Schedule
    from megatrain.parallel.simulator import Costs, simulate

    times = [json.loads(answer) for answer in answers]
    schedule = Schedule(args.schedule, 2, max(int(key.split()[0]) for key in times[0]) + 1, args.micro_batches)
    places = [schedule.home(virtual) for virtual in range(schedule.virtual_stages)]

    def of(kind: str) -> list[float]:
        return [times[stage].get(f"{chunk} {kind}", 0.0) for stage, chunk in places]

    both = [a + b for a, b in zip(of("backward"), of("backward_input"), strict=True)]
    return 1 - simulate(schedule, Costs(of("forward"), both, of("backward_weight"))).step_bubble


def measure(args: argparse.Namespace) -> dict:
    """Interleaved rounds of both sides."""
    together = not args.as_people_run_it
    if args.what == "single":
        sides = {"megatrain": Side("ours", 1, args, tuned=True), args.against: Side(args.against, 1, args, tuned=together)}
    elif args.what == "replicas":
        sides = {"megatrain": Side("replica", 2, args, tuned=True), args.against: Side(args.against, 2, args, tuned=together)}
    else:
        kind = "staged" if args.what == "pipeline" else "shared"
        sides = {"megatrain": Side(kind, 2, args, tuned=True), "alone": Side("ours", 2, args, tuned=True)}
    seconds = {name: [] for name in sides}
    for side in sides.values():
        side.go(args.warmup)
    for _ in range(args.pairs):
        for name, side in sides.items():
            seconds[name].append(side.go(args.steps))
    answers = sides["megatrain"].answers
    memory = {}
    if args.what in ("replicas", "single"):
        memory = {name: round(max(json.loads(a)["peak_mib"] for a in side.answers)) for name, side in sides.items()}
    for side in sides.values():
        side.close()
    tokens = args.micro_batch_size * args.micro_batches * shape_of(args)["seq_length"]
    ours, other = (seconds[name] for name in sides)
    # Two lone processes train two batches at once.
    ratios = sorted((b / len_other(args)) / a for a, b in zip(ours, other, strict=True))
    speed = {
        name: round(tokens * (len_other(args) if name == "alone" else 1) / statistics.median(s), 1)
        for name, s in seconds.items()
    }
    return {
        "what": args.what,
        "precision": args.precision,
        "allocator": "the same" if together else "as people run it",
        "tokens_per_second": speed,
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_min": round(ratios[0], 3),
        "ratio_max": round(ratios[-1], 3),
        "pairs": args.pairs,
        **({"zero_stage": args.zero} if args.what == "replicas" else {}),
        **({"peak_mib_of_a_rank": memory} if memory else {}),
        **(arithmetic(args, speed) if args.what == "single" else {}),
        **({key: getattr(args, key) for key in ("compile", "shape", "vocab", "loss_chunk")} if args.what == "single" else {}),
        **({"schedule": args.schedule, "expected": round(expected_of(args, answers), 3)} if args.what == "pipeline" else {}),
    }


def arithmetic(args: argparse.Namespace, speed: dict[str, float]) -> dict:
    """GFLOP/s of each side (model FLOPs, causal attention at half), and the share of a matmul's measured here, at this precision."""
    import torch

    from megatrain.config.schema import ModelConfig
    from megatrain.runtime.flops import model_flops_per_token, peak_flops

    torch.set_num_threads(args.threads)
    model = ModelConfig(activation="gelu", **shape_of(args))
    peak = peak_flops(torch.device("cpu"), torch.bfloat16 if args.precision == "bf16" else torch.float32).flops
    gflops = {name: model_flops_per_token(model, args.vocab) * tokens / 1e9 for name, tokens in speed.items()}
    shares = {name: round(1e9 * value / peak, 3) for name, value in gflops.items()}
    return {"gflops": {name: round(value) for name, value in gflops.items()}, "share_of_matmul_peak": shares}


def len_other(args: argparse.Namespace) -> int:
    """Batches that the other side trains in one of its steps."""
    return 1 if args.what in ("single", "replicas") else 2


def main() -> None:
    """Driver or worker, as the first argument says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "what",
        choices=("single", "tensor-parallel", "pipeline", "replicas", *WORKERS),
        help=f"{', '.join(WORKERS)} are workers",
    )
    parser.add_argument("--zero", type=int, choices=(0, 1, 2, 3), default=1, help="stage of the replicas")
    parser.add_argument(
        "--against",
        choices=("plain", "transformers", "ddp", "fsdp2"),
        help="what `single` (default plain) or `replicas` (default ddp) is compared with",
    )
    parser.add_argument("--compile", action="store_true", help="single: both sides under torch.compile")
    parser.add_argument("--shape", choices=SHAPES, default="8x512")
    parser.add_argument("--vocab", type=int, help="default: the shape's")
    parser.add_argument("--loss-chunk", type=int, default=0, help="megatrain's train.loss_chunk")
    parser.add_argument("--schedule", default="1f1b", help="of the pipeline")
    parser.add_argument("--micro-batches", type=int, default=1, help="a step's")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--as-people-run-it", action="store_true", help="plain PyTorch without megatrain's allocator settings")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=2, help="a round's steps")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2, help="of all processes of a side together")
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--tuned", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.vocab = args.vocab or SHAPES[args.shape]["vocab_size"]
    args.against = args.against or {"single": "plain", "replicas": "ddp"}.get(args.what)
    if args.what not in WORKERS:
        os.environ["OMP_NUM_THREADS"] = str(args.threads if args.what == "single" else 1)
        print(json.dumps(measure(args)))
        return
    sys.path.insert(0, str(Path(__file__).parent))
    import torch

    torch.set_num_threads(args.threads)
    if args.tuned:
        from megatrain.runtime.allocator import tune_allocator

        tune_allocator()
    if args.what in ("plain", "transformers"):
        plain_worker(args)
    elif args.what in ("ddp", "fsdp2"):
        peer_worker(args)
    else:
        our_worker(args)


if __name__ == "__main__":
    main()
