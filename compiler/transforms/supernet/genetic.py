"""NSGA-II over genomes, by pymoo: imported here alone, and only when asked for."""

import random

import numpy as np

from .explorer import Explorer
from .search_pass import TIRED, allowed_extreme_genomes, value_counts_by_dim


def run_nsga2(explorer: Explorer, rng: random.Random, population_size: int) -> None:
    """Generation after generation, until the explorer has ended or pymoo proposes nothing new any more.

    A choice that may not be taken breaks a constraint, and is not evaluated.
    Source: Deb et al. 2002; crossover and mutation with BootstrapNAS's numbers: SBX 0.9, eta 10; polynomial, eta 3.
    """
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.core.problem import Problem
    from pymoo.operators.crossover.sbx import SBX
    from pymoo.operators.mutation.pm import PM
    from pymoo.operators.repair.rounding import RoundingRepair

    widths = np.array(value_counts_by_dim(explorer))
    n_objectives = len(explorer.objectives)
    first = [tuple(rng.randrange(int(w)) for w in widths) for _ in range(max(0, population_size - 3))]
    algorithm = NSGA2(
        pop_size=population_size,
        sampling=np.array([*allowed_extreme_genomes(explorer), *first], dtype=float),
        crossover=SBX(prob=0.9, eta=10.0, vtype=float, repair=RoundingRepair()),
        mutation=PM(prob=1.0, prob_var=max(0.02, 1 / len(widths)), eta=3.0, vtype=float, repair=RoundingRepair()),
        eliminate_duplicates=True,
    )
    problem = Problem(n_var=len(widths), n_obj=n_objectives, n_ieq_constr=1, xl=np.zeros(len(widths)), xu=widths - 1.0)
    algorithm.setup(problem, termination=("n_gen", 10**6), seed=rng.randrange(2**31), verbose=False)
    idle = 0
    while not explorer.is_exhausted and idle < TIRED:
        before, proposed = len(explorer.known), algorithm.ask()
        genomes = [tuple(round(x) for x in one.X) for one in (proposed if proposed is not None else ())]
        explorer.prefetch(genome for genome in genomes if explorer.allows(genome))
        for one, genome in zip(proposed if proposed is not None else (), genomes, strict=True):
            allowed = explorer.allows(genome)
            if allowed and (genome in explorer.known or not explorer.is_exhausted):
                one.F, one.G = np.array(explorer.evaluate(genome)), np.array([-1.0])
            else:
                one.F, one.G = np.full(n_objectives, 1e30), np.array([1.0])
            one.F = np.nan_to_num(one.F, posinf=1e30)
            one.evaluated.update({"F", "G", "H"})
        if proposed is None or not len(proposed):
            return
        algorithm.tell(infills=proposed)
        idle = 0 if len(explorer.known) > before else idle + 1
