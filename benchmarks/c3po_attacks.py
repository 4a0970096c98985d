"""How far re-mixing can be misled, and what each defense is worth.

Attacks: `suffix` inserts 16 tokens before a question's cue that bring its embedding to references
of a family that nobody asks, found by reading 128 prompts that begin with its own phrases;
`poison1`, `poison2`, `poison3` put so many crafted references next to each victim (a true question
with the least likely option as its answer, and an inverted pathway); `twin` puts three, nearer than
a near-duplicate may be; `both` puts three at one wrong place and brings all victims there by a
suffix. The attacker knows model, references and method, and what the victims will ask; each attack
is run without a defense and with those that could help. `wrong_oracle` is no attack, but what none
can exceed by much: the same descent on the victim's own question with a wrong answer.

A line is `method_attack_defense_what: value`: `hostile`, share of the neighbors' weight that is the
attacker's among samples that were adapted; `refused`, share that kept the base's routing;
`accuracy`, of the re-mixed on the attacked prompts (`attack_base_accuracy`: of the base);
`hijacked`, share of what the base answers right on the same prompt and re-mixing turns wrong, with
`low` and `high` of its 95 % Wilson interval. `clean` is no attack: what a defense costs.

    python benchmarks/c3po_attacks.py [--quick] [--save] [--model FOLDER]

The folder holds a model, its tokenizer, and reference.jsonl and test.jsonl with the keys query,
choices, gold and family, as examples/train_choice_moe.py writes them. --quick takes a tiny random
model and random questions instead; what it prints says that the attacks run, not what they do.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import figures
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from expertmix.bindings.pathways import open_pathways
from expertmix.core.pathway import Question
from expertmix.optimize.attack import Append, Damage, append, damage
from expertmix.optimize.descent import NGD
from expertmix.optimize.gate import NO_GATE, Gate
from expertmix.optimize.neighbors import Neighbors
from expertmix.optimize.oracle import WrongOracle
from expertmix.optimize.poison import Poison, audit, poison
from expertmix.optimize.problem import Method
from expertmix.optimize.reference import ReferenceSet
from expertmix.optimize.regression import KernelRegression, Search
from expertmix.optimize.remix import remix
from expertmix.optimize.samples import Sample
from expertmix.study.paired import wilson
from expertmix.testing import tiny_moe

Figure = tuple[str, float]
CUE = "\nAnswer:"


@dataclass(frozen=True)
class Task:
    """What is attacked.

    Attributes:
        model: The model.
        reference: Questions for the reference set.
        victims: Questions that are asked.
        families: Of the references and of the victims, by sample name.
        behind: Tokens that the attacker cannot get behind.
        length: Tokens that he inserts.
        budget: Prompts that he may read per victim.
    """

    model: Any
    reference: list[Sample]
    victims: list[Sample]
    families: Mapping[str, str]
    behind: int
    length: int
    budget: int


@dataclass(frozen=True)
class Attacked:
    """Victims and references under an attack, and which references are the attacker's."""

    victims: list[Sample]
    reference: ReferenceSet
    hostile: frozenset[int]


@dataclass(frozen=True)
class Defense:
    """Settings that defend."""

    aggregate: Any = "mean"
    trust: float | None = None
    gate: Gate = NO_GATE
    max_similarity: float | None = None
    audited: bool = False
    k: int = 3


DEFENSES = {
    "none": Defense(),
    "filter": Defense(max_similarity=0.95),
    "median": Defense(aggregate="median"),
    "median_k7": Defense(aggregate="median", k=7),
    "far": Defense(gate=Gate(max_distance=0.9)),
    "agree": Defense(gate=Gate(min_agreement=0.3)),
    "fragile": Defense(gate=Gate(max_margin=1.0)),
    "trust": Defense(trust=0.02),
    "audit": Defense(audited=True),
    "all": Defense("median", 0.02, Gate(1.0, 0.9, 0.3), 0.95, True),
}
SUITE = {
    "clean": "none median median_k7 far agree fragile trust all",
    "suffix": "none median_k7 far agree fragile trust all",
    "poison1": "none median median_k7 agree fragile trust audit all",
    "poison2": "none median median_k7 agree audit",
    "poison3": "none median_k7 agree fragile trust audit all",
    "twin": "none filter",
    "both": "none median_k7 far agree audit all",
}
"""The defenses that could help, by attack; kernel regression is run without any."""


def measure(options: argparse.Namespace) -> Iterator[Figure]:
    """All lines."""
    task = tiny_task() if options.quick else choice_task(options.model, options.victims)
    with open_pathways(task.model) as pathways:
        true = ReferenceSet.build(pathways, task.reference)
        yield "references", float(len(true))
        yield "victims", float(len(task.victims))
        under = attacks(pathways, task, true)
        similarity = next(under)
        yield "suffix_similarity_before", similarity[0]
        yield "suffix_similarity_after", similarity[1]
        for name, attacked in under:
            purged = purge(pathways, attacked)
            if name == "clean":
                found = run(pathways, attacked, "wrong_oracle", DEFENSES["none"])
                yield from lines("wrong_oracle_clean_none", found)
            found = run(pathways, attacked, "kernel_regression", DEFENSES["none"])
            yield f"{name}_base_accuracy", found.base_right / found.samples
            yield from lines(f"kernel_regression_{name}_none", found)
            for label in SUITE[name].split():
                defense = DEFENSES[label]
                found = run(pathways, purged if defense.audited else attacked, "ngd", defense)
                yield from lines(f"ngd_{name}_{label}", found)


def attacks(pathways: Any, task: Task, true: ReferenceSet) -> Iterator[Any]:
    """The similarity of suffixes before and after, then attacks by name."""
    embedded = true.embed(pathways.read([one.question for one in task.victims]), task.victims)
    targets, wrong = elsewhere(task, true)
    phrases = [true.samples[number].question.prompt for number in wrong[:32]]
    kept = tuple(one[: len(one) - task.behind] for one in phrases)
    search = Append(task.length, task.budget, 16, task.behind, phrases=kept)
    led = append(pathways, task.victims, true, targets, search)
    yield [sum(getattr(one, key) for one in led) / len(led) for key in ("before", "after")]
    moved = [one.sample for one in led]
    yield "clean", Attacked(task.victims, true, frozenset())
    yield "suffix", Attacked(moved, true, frozenset(wrong))
    for count in (1, 2, 3):
        bad = poison(true, embedded, Poison(count))
        yield f"poison{count}", Attacked(task.victims, bad.reference, bad.hostile)
    bad = poison(true, embedded, Poison(3, similarity=0.99))
    yield "twin", Attacked(task.victims, bad.reference, bad.hostile)
    arrived = true.embed(pathways.read([one.question for one in moved]), moved)
    bad = poison(true, arrived.mean(0, keepdim=True), Poison(3))
    yield "both", Attacked(moved, bad.reference, bad.hostile)


def elsewhere(task: Task, true: ReferenceSet) -> tuple[Tensor, list[int]]:
    """A wrong place: the mean of one family's references, and their numbers; nobody asks it."""
    names = [task.families[one.name] for one in true.samples]
    asked = {task.families[one.name] for one in task.victims}
    family = next((name for name in sorted(set(names)) if name not in asked), names[0])
    wrong = [number for number, name in enumerate(names) if name == family]
    return true.embeddings[wrong].mean(0), wrong


def purge(pathways: Any, attacked: Attacked) -> Attacked:
    """Without the references that an audit finds."""
    found = set(audit(pathways, attacked.reference))
    kept = [number for number in range(len(attacked.reference)) if number not in found]
    hostile = frozenset(new for new, number in enumerate(kept) if number in attacked.hostile)
    return Attacked(attacked.victims, attacked.reference.subset(kept), hostile)


def run(pathways: Any, attacked: Attacked, name: str, defense: Defense) -> Damage:
    """One attack, one method, one defense."""
    near = Neighbors(k=defense.k, max_similarity=defense.max_similarity, ngram=None)
    method: Method = KernelRegression(Search(aggregate=defense.aggregate), defense.aggregate)
    if name == "wrong_oracle":
        method = WrongOracle(NGD(core=None))
    elif name == "ngd":
        method = NGD(core=None, aggregate=defense.aggregate, trust=defense.trust)
    found = remix(
        pathways, attacked.victims, attacked.reference, method, neighbors=near, gate=defense.gate
    )
    return damage(found, found, attacked.hostile)


def lines(mark: str, found: Damage) -> Iterator[Figure]:
    """A damage as shares."""
    share = wilson(found.hijacked, max(1, found.base_right))
    yield f"{mark}_hostile", found.hostile
    yield f"{mark}_refused", found.refused / found.samples
    yield f"{mark}_accuracy", found.right / found.samples
    yield f"{mark}_hijacked", found.hijacked / max(1, found.base_right)
    yield f"{mark}_hijacked_low", share.low
    yield f"{mark}_hijacked_high", share.high


def choice_task(folder: Path, count: int) -> Task:
    """The trained model's questions; one family is left to the attacker."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = {name: read(folder / f"{name}.jsonl") for name in ("reference", "test")}
    hostile = min(row["family"] for row in rows["reference"])
    asked = [row for row in rows["test"] if row["family"] != hostile]
    asked = asked[:: max(1, len(asked) // count)][:count]
    known = rows["reference"][::2]
    families: dict[str, str] = {}
    references, victims = (
        [sample(tokenizer, row, f"{kind}{number}", families) for number, row in enumerate(part)]
        for kind, part in (("r", known), ("t", asked))
    )
    behind = len(tokenizer(CUE)["input_ids"])
    return Task(model, references, victims, families, behind, length=16, budget=128)


def read(file: Path) -> list[dict[str, Any]]:
    """Rows of a jsonl file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def sample(tokenizer: Any, row: dict[str, Any], name: str, families: dict[str, str]) -> Sample:
    """A row as a sample; options follow the cue with a blank."""
    families[name] = row["family"]
    options = tuple(tuple(tokenizer(f" {one}")["input_ids"]) for one in row["choices"])
    return Sample(Question(tuple(tokenizer(row["query"])["input_ids"]), options), row["gold"], (),
                  name)  # fmt: skip


def tiny_task() -> Task:
    """A tiny random model, which is always right: gold is what it answers."""
    model = tiny_moe("olmoe")
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 90, (36, 12), generator=generator)
    samples = [
        Sample(Question(tuple(row.tolist()), ((5,), (6,), (7,), (8,))), 0, (), str(number))
        for number, row in enumerate(prompts)
    ]
    with open_pathways(model) as pathways:
        readings = pathways.read([one.question for one in samples])
    samples = [
        replace(one, gold=int(reading.logprobs.sum(-1).argmax()))
        for one, reading in zip(samples, readings, strict=True)
    ]
    families = {one.name: "wrong" if number < 8 else "right" for number, one in enumerate(samples)}
    return Task(model, samples[:28], samples[28:], families, 1, length=8, budget=64)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    parser = figures.parser(__doc__, "a tiny random model")
    parser.add_argument("--model", type=Path, default=Path("runs/choice-moe"))
    parser.add_argument("--victims", type=int, default=80)
    figures.show("c3po_attacks", parser.parse_args(), measure)
