"""Other layouts of the same run: which there are, which fit, which is fastest, and what makes one fit."""

from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from megamf.config import ConfigError, RunConfig
from megamf.plan.cluster import Cluster
from megamf.plan.job import Engine
from megamf.plan.predict import Prediction, predict

RECOMPUTATION = ("none", "experts", "full")
LARGEST_MICRO_BATCH = 64


def search(config: RunConfig, cluster: Cluster) -> list[Prediction]:
    """The fitting layouts of `config` on `cluster`, fastest first.

    Expert parallelism x DeepSpeed configuration x context x recomputation; of each the fastest micro batch. Layouts
    that the run would refuse are left out.
    """
    best: dict[tuple, Prediction] = {}
    read: dict[tuple, Engine] = {}
    for candidate in candidates(config, cluster):
        # A packaged configuration takes its sizes from the run: what else it says is read once.
        known = (candidate.deepspeed, candidate.parallel.ep > 1)
        found = try_predict(candidate, cluster, read.get(known))
        if found is not None and Path(candidate.deepspeed).suffix != ".json":
            read[known] = found.job.engine
        if found is None or not found.fits:
            continue
        key = (found.job.ep, candidate.deepspeed, found.job.context, candidate.train.activation_checkpointing)
        if key not in best or found.time.total < best[key].time.total:
            best[key] = found
    return sorted(best.values(), key=_speed_then_simplicity)


def candidates(config: RunConfig, cluster: Cluster) -> Iterator[RunConfig]:
    """Every layout worth a look, the impossible ones included."""
    ranks = cluster.num_ranks
    for ep in possible_degrees(config, ranks):
        for context in divisors(cluster.gpus_per_node):
            share = config.train.global_batch * context // ranks
            for micro_batch in (size for size in divisors(share) if size <= LARGEST_MICRO_BATCH):
                for name in engines(config):
                    for mode in RECOMPUTATION:
                        yield vary(
                            config,
                            ep=ep,
                            context=context,
                            micro_batch=micro_batch,
                            deepspeed=name,
                            activation_checkpointing=mode,
                        )


def possible_degrees(config: RunConfig, num_ranks: int) -> list[int]:
    """Over how many ranks the experts can be split."""
    found = []
    for ep in divisors(num_ranks):
        try:
            candidate = vary(config, ep=ep)
            candidate.parallel.check(num_ranks, config.model)
            candidate.check_degree()
        except ValueError:
            continue
        found.append(ep)
    return found


def vary(
    config: RunConfig,
    *,
    ep: int | None = None,
    context: int | None = None,
    micro_batch: int | None = None,
    deepspeed: str | None = None,
    activation_checkpointing: str | None = None,
) -> RunConfig:
    """A copy with some parts of the layout changed."""
    parallel = {"ep": ep, "context": context, "attention_experts": "auto" if ep == 1 else None}
    train = {"micro_batch": micro_batch, "activation_checkpointing": activation_checkpointing}
    return config.model_copy(
        update={
            "parallel": config.parallel.model_copy(update={k: v for k, v in parallel.items() if v is not None}),
            "train": config.train.model_copy(update={k: v for k, v in train.items() if v is not None}),
            "deepspeed": deepspeed or config.deepspeed,
        }
    )


def try_predict(config: RunConfig, cluster: Cluster, engine: Engine | None = None) -> Prediction | None:
    """None where the run would refuse the layout. engine: read before."""
    try:
        return predict(config, cluster, engine)
    except ConfigError:
        return None


def engines(config: RunConfig) -> list[str]:
    """The packaged DeepSpeed configurations, and the one that `config` names if it is another."""
    files = resources.files("megamf.ds_configs").iterdir()
    packaged = sorted(Path(entry.name).stem for entry in files if entry.name.endswith(".json"))
    return packaged if config.deepspeed in packaged else [*packaged, config.deepspeed]


def remedies(found: Prediction) -> list[Prediction]:
    """Layouts one change away from one that does not fit, that do fit; fastest first."""
    config, cluster = found.job.config, found.cluster
    train = config.train
    changes = [{"micro_batch": size} for size in divisors(train.micro_batch)[:-1]] + [
        {"ep": ep} for ep in divisors(cluster.num_ranks) if ep > found.job.ep
    ]
    changes += [{"activation_checkpointing": mode} for mode in RECOMPUTATION]
    changes += [{"deepspeed": name} for name in engines(config)]
    changes += [{"context": size} for size in divisors(cluster.gpus_per_node) if size > found.job.context]
    near = [try_predict(vary(config, **change), cluster) for change in changes]
    return sorted((item for item in near if item is not None and item.fits), key=_speed_then_simplicity)


def warnings(found: Prediction) -> list[str]:
    """What a user should know before this run is started, each with what to change."""
    job, cluster, said = found.job, found.cluster, []
    if not found.fits:
        over = (found.memory.peak - cluster.usable_memory) / 2**30
        near = remedies(found)
        help_ = f"fits with {near[0].overrides}" if near else "no single change makes it fit: try --search"
        said.append(f"does not fit: {over:.1f} GiB more than may be filled; {help_}")
    if job.config.tune.strategy != "full" and not job.tuned:
        said.append(
            f"tune.strategy={job.config.tune.strategy}: how many modules were inserted is not known here, the figures "
            "are those of training everything; `megamf train --dry-run` has those of this run"
        )
    if job.sparse and job.expert_group.crosses(cluster):
        said.append(
            f"parallel.ep={job.ep} reaches over nodes of {cluster.gpus_per_node}: every layer waits for the network; "
            f"parallel.ep={cluster.gpus_per_node} or less stays inside"
        )
    if job.config.losses.scope == "global_batch" and job.accumulation > 1 and job.sparse:
        said.append(
            "losses.scope=global_batch with accumulation costs one more forward pass; losses.scope=micro_batch does not"
        )
    if found.time.communication > 0.3 * found.time.total:
        share = found.time.communication / found.time.total
        said.append(f"{share:.0%} of a step is exposed communication; --search lists faster layouts")
    return said


def divisors(number: int) -> list[int]:
    """In ascending order."""
    return [d for d in range(1, number + 1) if number % d == 0]


def _speed_then_simplicity(found: Prediction) -> tuple:
    # Times that agree to a thousandth are the same prediction: then the simpler layout goes first.
    job = found.job
    return float(f"{found.time.total:.3g}"), job.context, job.ep, job.engine.stage, job.engine.offload_optimizer
