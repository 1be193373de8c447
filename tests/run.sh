#!/bin/sh
# Runs every test program in the given folder and every tests/cli_*.sh, each speaking TAP; names what failed and what
# was skipped; ends with one line of totals. Fails where anything failed, or where a skipped test is not on the list
# tests/skips.txt (one test name a line; a line's text up to the first space counts).
set -u
bin=${1:?usage: tests/run.sh FOLDER}
log=$(mktemp) || exit 1
all=$(mktemp) || exit 1
trap 'rm -f "$log" "$all"' EXIT
export CMOCKA_MESSAGE_OUTPUT=TAP
broken=0

run() { # run NAME COMMAND...
    name=$1
    shift
    start=$(date +%s)
    "$@" >"$log" 2>"$log.err"
    status=$?
    plan=$(sed -n 's/^1\.\.\([0-9]*\).*/\1/p' "$log" | tail -n 1)
    seen=$(grep -cE '^(not )?ok ' "$log")
    sed -n -E "s/^((not )?ok) [0-9]+ (- )?/\1 $name: /p" "$log" >>"$all"
    printf '%-28s %s tests, %s s\n' "$name" "$seen" $(($(date +%s) - start))
    if grep -q '^not ok ' "$log" | grep -qv SKIP || [ "$status" -ne 0 ] || [ "$seen" != "${plan:-none}" ]; then
        grep -v '^ok ' "$log"
        tail -n 40 "$log.err"
    fi
    # A program that crashed, or ran fewer tests than it planned, is a failure of its own.
    if [ "$seen" != "${plan:-none}" ]; then
        echo "not ok $name: planned ${plan:-no} tests, ran $seen, exit status $status" >>"$all"
    fi
    rm -f "$log.err"
}

for test in "$bin"/test_*; do
    case $test in *.o | *.d) continue ;; esac
    run "$(basename "$test")" "$test"
done
for test in tests/cli_*.sh; do
    [ -e "$test" ] && run "$(basename "$test" .sh)" sh "$test"
done

skipped=$(grep -c '# SKIP' "$all")
failed=$(grep -v '# SKIP' "$all" | grep -c '^not ok ')
passed=$(grep -v '# SKIP' "$all" | grep -c '^ok ')
grep '# SKIP' "$all" | sed -E 's/^(not )?ok /skipped: /'
grep -v '# SKIP' "$all" | sed -n 's/^not ok /FAILED: /p'
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
