#!/bin/sh
# Runs the test programs of a folder and the shell tests tests/cli_*.sh and tests/test_*.sh, all of which speak TAP on
# stdout. Names what failed and what was skipped and ends with one line of totals.
# With LTN_SKIPS=FILE, a skipped test that the file does not name ("PROGRAM: TEST", one a line) is a failure.
set -u
bin=${1:?usage: tests/run.sh FOLDER}
LTN_BIN=$(cd "${2:-.}" && pwd)
LTN_TESTS=$(cd "$bin" && pwd) # where make_model is
export LTN_BIN LTN_TESTS CMOCKA_MESSAGE_OUTPUT=TAP
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
: >"$work/all"

run() { # run NAME COMMAND...
    name=$1
    shift
    begin=$(date +%s)
    timeout 900 "$@" >"$work/out" 2>"$work/err" </dev/null
    status=$?
    planned=$(sed -n 's/^1\.\.\([0-9]*\).*/\1/p' "$work/out" | tail -n 1)
    ran=$(grep -cE '^(not )?ok ' "$work/out")
    # "ok 3 - name", "not ok 4 # SKIP name" -> "ok PROGRAM: name", "skip PROGRAM: name"
    sed -n -E -e "s/^(not )?ok [0-9]+ (- )?# SKIP ?(.*)/skip $name: \3/p; t" \
        -e "s/^(not )?ok [0-9]+ (- )?(.*) # SKIP.*/skip $name: \3/p; t" \
        -e "s/^((not )?ok) [0-9]+ (- )?/\1 $name: /p" "$work/out" >"$work/mine"
    cat "$work/mine" >>"$work/all"
    printf '%-24s %4d tests, %3d s\n' "$name" "$ran" $(($(date +%s) - begin))
    if [ "$ran" != "${planned:-none}" ]; then
        echo "not ok $name: ran $ran of ${planned:-no} planned tests, exit status $status" >>"$work/all"
    fi
    if [ "$ran" != "${planned:-none}" ] || [ "$status" -ne 0 ] || grep -q '^not ok' "$work/mine"; then
        grep -v '^ok ' "$work/out"
        tail -n 50 "$work/err"
        grep -q '^not ok' "$work/mine" || [ "$ran" != "${planned:-none}" ] ||
            echo "not ok $name: exit status $status" >>"$work/all"
    fi
}

for test in "$bin"/test_*; do
    case $test in
    *.[od]) ;;
    *) run "$(basename "$test")" "$test" ;;
    esac
done
for test in tests/cli_*.sh tests/test_*.sh; do
    run "$(basename "$test" .sh)" sh "$test"
done

sed -n 's/^skip /skipped: /p' "$work/all"
if [ -n "${LTN_SKIPS:-}" ]; then
    sed -n 's/^skip //p' "$work/all" | grep -vxF -f "$LTN_SKIPS" | sed 's/$/ (skipped, and not on the list of tests that may be)/; s/^/not ok /' >>"$work/all"
fi
sed -n 's/^not ok /FAILED: /p' "$work/all"
passed=$(grep -c '^ok ' "$work/all")
failed=$(grep -c '^not ok ' "$work/all")
skipped=$(grep -c '^skip ' "$work/all")
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ] && [ "$passed" -gt 0 ]
