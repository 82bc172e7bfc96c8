"""What will a pretraining need on a cluster, and how is it best spread? Neither data nor GPUs have to be there.

python launch/plan_run.py configs/pretrain/quickstart.yaml configs/plan_run/laptop.yaml [key=value ...] [--json]

Overrides of the cluster begin with ``cluster.`` or are ``latent_shape=[16,16,16]``; all others are the training's.
"""

import json

from shodh.command_line import run, split_arguments

USAGE = "launch/plan_run.py CONFIG.yaml CLUSTER.yaml [key=value ...] [--json]"


def main(arguments: list[str]) -> None:
    path, rest = split_arguments([a for a in arguments if a != "--json"], USAGE)
    cluster_path, overrides = split_arguments(rest, USAGE)
    from settings import Pretraining, RunPlanning, workload_of

    from shodh.config import load_config
    from shodh.planning.arrangement import list_settings
    from shodh.planning.plan import forecast, list_warnings
    from shodh.planning.recommendation import recommend
    from shodh.planning.table import describe_plans, name_values

    ours = [o for o in overrides if o.startswith(("cluster.", "latent_shape="))]
    config = load_config(Pretraining, path, [o for o in overrides if o not in ours])
    planning = load_config(RunPlanning, cluster_path, ours)
    workload, cluster = workload_of(config, planning), planning.cluster
    plan = forecast(workload, cluster)
    arranged, best = recommend(workload, cluster)
    settings = list_settings(best.arrangement, cluster.num_ranks)
    warnings = list(list_warnings(workload, cluster, plan))
    if "--json" in arguments:
        plans = {"as_configured": name_values(plan), "recommended": name_values(best)}
        print(json.dumps(plans | {"settings": settings, "warnings": warnings}, indent=1))
        return
    print(describe_plans({"as configured": plan, "recommended": best}, cluster))
    for title, lines in (("as configured", warnings), ("recommended", list_warnings(arranged, cluster, best))):
        for line in lines:
            print(f"{title}: {line}")
    print(f"recommended: {' '.join(settings)}")


if __name__ == "__main__":
    run(main)
