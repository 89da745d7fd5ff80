#!/usr/bin/env bash
# A job on TPU slices of a GKE cluster, through xpk (github.com/AI-Hypercomputer/xpk).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

usage() {
    cat <<'TEXT'
usage: bash launch/gke_xpk.sh run CONFIG [--root gs://BUCKET/NAME] [--steps LIST] [-- OVERRIDE...]
       bash launch/gke_xpk.sh list | delete

  run     submit the steps of the recipe; xpk restarts them after an interruption
  list    jobs of the cluster
  delete  remove the job; the runs stay in the bucket

Each takes --dry-run: only print the commands. Steps and overrides: bash launch/host.sh --help.
From the environment: PROJECT, ZONE, CLUSTER, WORKLOAD (cllm); for run also ACCELERATOR, IMAGE
(built from launch/Dockerfile), BUCKET if there is no --root, MAX_RESTARTS (50).
TEXT
}

take_verb 'run list delete' "${1-}"
parse "${@:2}"
[[ $verb == run ]] || no_recipe
need PROJECT 'the id of a Google Cloud project' my-project
need ZONE 'the zone of the cluster' us-west4-a
need CLUSTER 'the name of a cluster made by xpk' my-cluster
where=(--project "$PROJECT" --zone "$ZONE" --cluster "$CLUSTER")
WORKLOAD=${WORKLOAD:-cllm}

case $verb in
    run)
        need ACCELERATOR 'an accelerator type (see launch/README.md)' v6e-16
        need IMAGE 'an image built from launch/Dockerfile' us-docker.pkg.dev/my-project/my-repo/cllm_jax:1
        bucket_root
        make_job
        # xpk sends SIGTERM to the shell that it starts the command in, hence exec. It restarts a job
        # after 143 but not after 75; codes that no restart can help stay what they are.
        run xpk workload create "${where[@]}" --workload "$WORKLOAD" --tpu-type "$ACCELERATOR" \
            --docker-image "$IMAGE" --max-restarts "${MAX_RESTARTS:-50}" \
            --termination-grace-period-seconds 120 \
            --command "exec env RESTART_CODE=143 $(quoted "${job[@]}")"
        ;;
    list) run xpk workload list "${where[@]}" ;;
    delete) run xpk workload delete "${where[@]}" --workload "$WORKLOAD" --force ;;
esac
