"""Interface for authors of plug-ins, importable as `effc.plugin`: docs/plugins.md.

Names here keep their meaning within a minor version. What is not here is effc's own and may move at any time.
"""

from .compiler.analysis.discovery.discover import skeleton_of
from .compiler.analysis.planning.selection import branches, groups, inner_parts, layers
from .compiler.core.environment import check_modules
from .compiler.inputs.windows import choose_rows, content_identity, encode, find_files, require_tokenizer, token_windows
from .compiler.ir.layers.linear import weight_of
from .compiler.ir.outcome import Outcome
from .compiler.ir.program import Program
from .compiler.models.rows.forward import finite, total_nll
from .compiler.plugin.context import Context
from .compiler.plugin.interfaces import Close, Data, Effort, Lossy, Metric, Pass, Source, param
from .compiler.plugin.row_scores import RowScores
from .compiler.plugin.target import ArtifactSummary, Form, LoadRequest, RunRequest, Target
from .compiler.transforms.editing.rewrite import Rewriter
from .compiler.transforms.search.sparsity import chosen_parts, finite_weight, replace_weight
from .dsl.checker.rules import Conflict, MissingStep, Problem, Unread
from .dsl.checker.skeleton import Branch, Group, Part, Skeleton
from .dsl.checker.values import Bytes, DataRef, Duration, MetricRef, ModelRef, Range, Ratio, Selector, Shares, StepRef
from .dsl.syntax.diagnostics import Diagnostic, Fault, Reject

__all__ = [
    "ArtifactSummary",
    "Branch",
    "Bytes",
    "Close",
    "Conflict",
    "Context",
    "Data",
    "DataRef",
    "Diagnostic",
    "Duration",
    "Effort",
    "Fault",
    "Form",
    "Group",
    "LoadRequest",
    "Lossy",
    "Metric",
    "MetricRef",
    "MissingStep",
    "ModelRef",
    "Outcome",
    "Part",
    "Pass",
    "Problem",
    "Program",
    "Range",
    "Ratio",
    "Reject",
    "Rewriter",
    "RowScores",
    "RunRequest",
    "Selector",
    "Shares",
    "Skeleton",
    "Source",
    "StepRef",
    "Target",
    "Unread",
    "branches",
    "check_modules",
    "choose_rows",
    "chosen_parts",
    "content_identity",
    "encode",
    "find_files",
    "finite",
    "finite_weight",
    "groups",
    "inner_parts",
    "layers",
    "param",
    "replace_weight",
    "require_tokenizer",
    "skeleton_of",
    "token_windows",
    "total_nll",
    "weight_of",
]
