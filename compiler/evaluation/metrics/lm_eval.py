"""The score of a task of EleutherAI's evaluation harness."""

from contextlib import redirect_stderr
from io import StringIO
from typing import Any, ClassVar

from torch import nn

from ....dsl.syntax.diagnostics import Fault
from ....dsl.syntax.nearest import nearest_name_help
from ...core.environment import check_modules
from ...core.json_errors import first_line
from ...inputs.windows import require_tokenizer
from ...models.checkpoints.checkpoint import without_library_logs
from ...models.checkpoints.model_folder import remote_code
from ...models.rows.forward import evaluating, finite
from ...plugin.context import Context
from ...plugin.interfaces import Metric, param

unknown_task = Fault("unknown-task", "The evaluation harness has no such task, or the task no such score.")
task_unreachable = Fault("task-unreachable", "The data of an evaluation task can't be had.", exit="network")


class LmEval(Metric):
    """The score of a task of EleutherAI's evaluation harness.

    The harness runs on the model as it is, zero-shot unless `shots` says otherwise, so figures compare with
    published ones. Its data sets come from the hub. `tasks` names a folder of the user's own task files: they
    may hold Python, so it needs `--trust-remote-code`.

    Source: Gao et al., "The Language Model Evaluation Harness" (doi 10.5281/zenodo.12608602).
    Example: lm_eval("arc_easy", score: "acc_norm", limit: 200) >= 0.97 * base
    """

    extra: ClassVar[str] = "eval"
    requires: ClassVar[tuple[str, ...]] = ("lm_eval",)
    better: ClassVar[str] = "higher"

    task: str = param("Name of the task.", positional=True)
    score: str = param("Which of the task's scores.", default="acc")
    shots: int = param("Solved examples in front of every question.", default=0, ge=0)
    limit: int | None = param("How many questions; all of them where it is left out.", default=None, ge=1)
    batch: int = param("Questions that run together.", default=4, ge=1)
    tasks: str | None = param("Folder of own task files, relative to the recipe.", default=None)

    def measure(self, model: nn.Module, ctx: Context) -> float:
        check_modules(self.requires, self.extra, "metric lm_eval")
        if self.tasks and not ctx.settings.trust_remote_code:
            raise remote_code(
                f"lm_eval reads tasks from {ctx.folder / self.tasks}, which may hold code",
                help="read those files, then add --trust-remote-code",
            ).rejection()
        scores = self._scores(model, ctx)
        values = {name.removesuffix(",none"): value for name, value in scores.items() if isinstance(value, float)}
        if self.score not in values:
            raise unknown_task(
                f"the task `{self.task}` has no score `{self.score}`",
                help=nearest_name_help(self.score, values, "it has"),
            ).rejection()
        return finite(values[self.score], f"lm_eval `{self.task}`")

    def _scores(self, model: nn.Module, ctx: Context) -> dict[str, Any]:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        manager = TaskManager(include_path=str(ctx.folder / self.tasks) if self.tasks else None)
        if self.task not in manager.all_tasks:
            raise unknown_task(
                f"the harness has no task `{self.task}`", help=nearest_name_help(self.task, manager.all_tasks)
            ).rejection()
        tokenizer = require_tokenizer(ctx.tokenizer, ctx)
        try:
            with without_library_logs(), redirect_stderr(StringIO()), evaluating(model):  # its bars have no switch
                wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=self.batch)
                result = simple_evaluate(
                    wrapped,
                    tasks=[self.task],
                    num_fewshot=self.shots,
                    limit=self.limit,
                    task_manager=manager,
                    log_samples=False,
                    bootstrap_iters=0,
                    random_seed=ctx.seed,
                    numpy_random_seed=ctx.seed,
                    torch_random_seed=ctx.seed,
                    fewshot_random_seed=ctx.seed,
                )
        except (ConnectionError, FileNotFoundError) as error:
            raise task_unreachable(
                f"the data of the task `{self.task}` can't be had",
                help="check the network; what was fetched once is kept",
                note=first_line(error),
            ).rejection() from error
        return result["results"][self.task]
