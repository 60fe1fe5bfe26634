"""lm-eval tasks at many precisions with one model load: the only file that imports lm_eval."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from anybits.config import Single
from anybits.errors import AnybitsError
from anybits.integrations import transformers as hf
from anybits.precision import precision as scoped


def run_tasks(
    folder: str | Path,
    tasks: Sequence[str],
    precisions: Sequence[Single],
    include_path: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **load: Any,
) -> dict[Single, dict[str, dict[str, Any]]]:
    """Return precision -> task -> metric -> value of lm-eval's `tasks` on the checkpoint `folder`.

    include_path: a folder of task files of one's own, read without a network; limit: documents of each task;
    load: options of loading (dtype, device_map). Raises AnybitsError for tasks that do not exist and
    precisions that are not stored.
    """
    stored = hf.stored_config(folder)
    precisions = [stored.check_single(p) for p in precisions]
    lm_eval, manager = _library(include_path, tasks)
    model = hf.load_model(folder, max_precision=max(map(stored.planes_of, precisions)), **load)
    adapter = lm_eval.models.huggingface.HFLM(
        pretrained=model, tokenizer=hf.load_tokenizer(folder), batch_size=batch_size
    )
    results = {}
    for index, p in enumerate(precisions):
        with scoped(p):
            measured = lm_eval.simple_evaluate(
                model=adapter,
                tasks=list(tasks),
                num_fewshot=num_fewshot,
                limit=limit,
                task_manager=manager,
                log_samples=False,
                bootstrap_iters=0,
                verbosity="ERROR",
            )
        results[p] = {task: _plain(values) for task, values in measured["results"].items()}
        progress(index + 1, len(precisions))
    return results


def _library(include_path: str | Path | None, tasks: Sequence[str]) -> tuple[Any, Any]:
    """Return lm_eval and a list of tasks that holds all of `tasks`."""
    try:
        import lm_eval
        import lm_eval.models.huggingface
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise AnybitsError(f"lm-eval tasks need: pip install 'anybits[eval]' ({error})") from None
    if include_path is not None and not Path(include_path).is_dir():
        raise AnybitsError(f"{include_path} is not a folder of lm-eval tasks")
    try:
        if include_path is not None:  # reading lm-eval's own list takes ten seconds, so only when it is needed
            own = TaskManager(include_path=str(include_path), include_defaults=False)
            if set(tasks) <= set(own.all_tasks):
                return lm_eval, own
        manager = TaskManager(include_path=None if include_path is None else str(include_path))
    except Exception as error:  # a task file of the user's own may be wrong in any way
        raise AnybitsError(f"the tasks in {include_path} cannot be read: {error}") from None
    _check_tasks(set(manager.all_tasks), tasks)
    return lm_eval, manager


def _check_tasks(known: set[str], tasks: Sequence[str]) -> None:
    for task in tasks:
        if task not in known:
            near = sorted(name for name in known if task.lower() in name.lower())[:3]
            hint = f": did you mean {', '.join(near)}?" if near else ": see lm-eval's own list, or --include-path"
            raise AnybitsError(f"lm-eval has no task '{task}'{hint}")


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Return "metric" or "metric,filter" -> number, without standard errors that were not computed."""
    numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
    return {key.removesuffix(",none"): value for key, value in numbers.items() if "_stderr" not in key}
