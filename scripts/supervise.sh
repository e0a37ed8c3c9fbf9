#!/usr/bin/env bash
# Starts a run again until it has ended, or needs a person.
#
#     bash scripts/supervise.sh phi3-jax train --resume=auto --config FILE
#
# Exit codes 1 and 2 need a person, and 130 is Ctrl-C (docs/training.md has all of them): with these,
# and with 0, this script ends. After any other one, such as that of a preemption or a lost host, it
# waits for RESTART_SECONDS (10) and starts the same command again. SIGTERM, SIGINT, and SIGHUP are
# passed on, and end the script when the run has saved its checkpoint.
set -u

child=
stopped=
pass_on() {
    stopped=yes
    [ -z "$child" ] || kill -"$1" "$child" 2>/dev/null
}
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT
trap 'pass_on HUP' HUP

while true; do
    "$@" &
    child=$!
    wait "$child"
    code=$?
    # A signal ends `wait`, not the run.
    while kill -0 "$child" 2>/dev/null; do
        wait "$child"
        code=$?
    done
    child=
    case $code in 0 | 1 | 2 | 130) exit "$code" ;; esac
    [ -z "$stopped" ] || exit "$code"
    echo "supervise: exit code $code; starting again in ${RESTART_SECONDS:-10} s" >&2
    sleep "${RESTART_SECONDS:-10}" &
    wait $!
    [ -z "$stopped" ] || exit "$code"
done
