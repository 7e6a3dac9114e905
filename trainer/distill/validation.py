"""How good the student is while it trains: figures of its pictures every so many steps, the best so far, and when to stop.

With several processes each makes a part of the pictures, and the first one takes the figures. No random number of the
run is drawn for it, so a run trains the same with it and without.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from wadi_core.files import atomic_write, refusal

from ..data import picture_files
from ..data.prompts import MINI, PromptList
from ..engine.logs import LossTable
from ..evaluation import extractors
from ..evaluation.clip_score import ClipScore
from ..evaluation.figures import Reference, judge, read_statistics
from ..evaluation.metrics import Projection, spread
from ..evaluation.retrieval import Prototypes
from ..evaluation.sources import LOOK_BATCH, Files, Source, features_of
from .distillation import Distillation
from .export import export

logger = logging.getLogger("wadi")

METRICS, BEST = "metrics.csv", "best.json"
FIRST_SEED = 1 << 20  # of the noise of pictures; far from those of sheets
DIVERSE = 16  # captions whose pictures are compared with each other
SEEDS = 4  # pictures of each of them
LOWER = ("fid", "kid")  # figures of which the smaller is the better
STUDIED = 2  # pictures of each object that prototypes are learned from


class Validation:
    """Figures of a run's student.

    Args:
        run: whose settings name the reference, the extractor and the CLIP model.

    Raises:
        OSError, ValueError: one of them cannot be read, or there are too few prompts; one line.
    """

    def __init__(self, run: Distillation) -> None:
        config, self.run, self.first = run.config, run, run.processes.first
        self.mini = config.base == MINI
        self.reference_name = config.reference or (MINI if self.mini else "")
        name = config.extractor or (MINI if self.reference_name == MINI else "inception")
        inception = Path(config.inception) if config.inception else None
        self.extractor = extractors.find(name, run.device, inception) if self.reference_name else None
        self.clip = ClipScore(config.clip_model, run.device) if config.clip_model else None
        if self.extractor is None and self.clip is None:
            raise ValueError("evaluate_every: there is nothing to measure with: name a reference or a clip_model")
        self.prompts = self._prompts()
        self.kept = run.output / "evaluation"
        self.table = LossTable(run.output / METRICS, run.step) if self.first else None
        self.best = self._read_best()
        self._reference: Reference | None = None
        self._prototypes: Prototypes | None = None

    def _prompts(self) -> list[str]:
        config, count = self.run.config, self.run.config.evaluate_count
        if config.evaluate_prompts:
            found = list(PromptList.read(config.evaluate_prompts))[:count]
        elif self.mini:
            from ..mini import scenes
            from ..mini.reference import MINI_PROMPTS

            found = [scenes.scene(MINI_PROMPTS + row).caption for row in range(count)]
        else:
            found = (
                self.run.prompts.at(range(count)) if self.run.prompts.count is None else list(self.run.prompts.prompts)[:count]
            )
        if len(found) < count:
            raise ValueError(f"evaluate_count: {count} pictures are asked for, and there are {len(found)} prompts for them")
        return found

    def _read_best(self) -> dict[str, Any] | None:
        path = self.run.output / BEST
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return {"step": int(found["step"]), "name": str(found["name"]), "value": float(found["value"])}
        except (ValueError, KeyError, TypeError) as error:
            raise refusal(path, "this is no record of a best student; remove it") from error

    def reference(self) -> Reference:
        """What is known of the real pictures; read or looked at once."""
        if self._reference is None and self.extractor is not None:
            side, name = self.run.size[0], self.reference_name
            if name != MINI and not Path(name).is_dir():
                self._reference = read_statistics(Path(name), self.extractor, None)
            else:
                source = self._drawn(False) if name == MINI else Files(picture_files.pictures_in(name))
                self._reference = Reference(features_of(source, "real", self.extractor, self.kept, side).numpy())
        if self._reference is None:
            raise ValueError("there is no reference")
        return self._reference

    def _drawn(self, single: bool) -> Source:
        """Real scenes, of mixed objects or of each one alone."""
        from ..mini import scenes
        from ..mini.reference import Drawn

        return Drawn(STUDIED * len(scenes.things()) if single else self.run.config.evaluate_count, single)

    def measure(self) -> dict[str, float]:
        """The figures of the student as it is now, in the first process; the others get none."""
        run, found = self.run, {}
        rows = range(run.processes.rank, len(self.prompts), run.processes.count)
        looked, scores = self._look(rows, [self.prompts[row] for row in rows])
        everyone = run.processes.gather((list(rows), looked, scores))
        diverse = self._diverse() if self.first and self.extractor is not None else None
        if not self.first:
            return {}
        order = np.argsort(np.concatenate([part for part, _, _ in everyone]))
        if self.extractor is not None:
            features = np.concatenate([part for _, part, _ in everyone])[order]
            reference = self.reference()
            found |= judge(features, reference, self.extractor.components).figures
            if diverse is not None:
                # In the directions in which real pictures differ, as far as there are enough of them to know.
                known = reference.features
                components = self.extractor.components
                if known is not None and components and min(known.shape) > components:
                    diverse = Projection.fit(known, components)(diverse)
                found["diversity"] = spread(diverse.reshape(-1, SEEDS, diverse.shape[1]))
            if self.mini:
                found |= self._retrieval(features)
        if self.clip is not None:
            found["clip_score"] = float(np.concatenate([part for _, _, part in everyone]).mean())
        return found

    def _look(self, rows: range, prompts: list[str], with_clip: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Features and CLIP scores of pictures of some prompts, each from the noise of its row."""
        features, scores, extractor, clip = [], [], self.extractor, self.clip if with_clip else None
        for start in range(0, len(rows), LOOK_BATCH):
            part = slice(start, start + LOOK_BATCH)
            made = self.run.pictures(prompts[part], [FIRST_SEED + row for row in rows[part]])
            if extractor is not None:
                features.append(extractor.look(picture_files.to_bytes(made), rows[part]).numpy())
            if clip is not None:
                scores.append(clip(made, prompts[part]).double().numpy())
        return np.concatenate(features or [np.empty((len(rows), 0))]), np.concatenate(scores or [np.empty(0)])

    def _diverse(self) -> np.ndarray:
        prompts = [prompt for prompt in self.prompts[:DIVERSE] for _ in range(SEEDS)]
        rows = range(len(self.prompts), len(self.prompts) + len(prompts))
        return self._look(rows, prompts, with_clip=False)[0]

    def _retrieval(self, features: np.ndarray) -> dict[str, float]:
        """Shares of pictures whose objects are the nearest prototypes: of single objects, and both of two."""
        from ..mini import scenes
        from ..mini.reference import MINI_PROMPTS

        things = scenes.things()
        if self._prototypes is None:
            source = self._drawn(True)
            studied = features_of(source, "objects", self.extractor, self.kept, None).numpy()  # pyright: ignore
            shown = [[row % len(things)] for row in range(source.count)]
            self._prototypes = Prototypes.fit(studied, shown, len(things))
        plans = [scenes.scene(MINI_PROMPTS + row) for row in range(len(features))]
        if [plan.caption for plan in plans] != self.prompts:  # prompts of one's own name no objects
            return {}
        wanted = [[placed.thing.index for placed in plan.placed] for plan in plans]
        found = {}
        for size, name in ((1, "retrieval_single"), (2, "retrieval_both")):
            chosen = [row for row, objects in enumerate(wanted) if len(objects) == size]
            if chosen:
                hits = self._prototypes.hits(features[chosen], [wanted[row] for row in chosen])
                found[name] = float((hits == size).mean())
        return found

    def take(self) -> dict[str, float]:
        """Measure, write the figures down, and keep the student if it is the best so far."""
        run, config = self.run, self.run.config
        found = self.measure()
        if not self.first or self.table is None:
            return {}
        self.table.add(run.step, found)
        name = config.best_by or next((name for name in ("fid", "clip_score") if name in found), "")
        if name not in found:
            raise ValueError(f"best_by: {name} is not measured here; there is {', '.join(found)}")
        value, sign = found[name], 1 if name in LOWER else -1
        logger.info("step %d: %s", run.step, ", ".join(f"{key} {number:.4g}" for key, number in found.items()))
        if self.best is None or self.best["name"] != name or sign * value < sign * self.best["value"]:
            export(run, run.output, stem=f"{config.name}-best")
            self.best = {"step": run.step, "name": name, "value": value}
            with atomic_write(run.output / BEST) as file:
                file.write(json.dumps(self.best).encode())
        return found

    @property
    def over(self) -> bool:
        """Whether the figures have not become better for as long as the settings allow."""
        patience = self.run.config.patience
        if not patience or self.best is None or self.table is None:
            return False
        return sum(row["step"] > self.best["step"] for row in self.table.rows) >= patience
