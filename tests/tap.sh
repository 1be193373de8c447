# TAP for shell tests; sourced. Programs are found in $LTN_BIN, make_model in $LTN_TESTS.
LTN_BIN=${LTN_BIN:-.}
LTN_TESTS=${LTN_TESTS:-build/release/tests}
tap_n=0
tmp=$(mktemp -d) || exit 1
trap 'rm -rf "$tmp"' EXIT

# on_cpu PROGRAM: makes $tmp/PROGRAM, which runs it on the CPU whatever else this machine has
on_cpu() {
    printf '#!/bin/sh\nexec "%s/%s" --device cpu "$@"\n' "$(cd "$LTN_BIN" && pwd)" "$1" >"$tmp/$1"
    chmod +x "$tmp/$1"
}

# pass NAME COMMAND...: the command must succeed
pass() {
    tap_name=$1
    shift
    tap_n=$((tap_n + 1))
    if "$@"; then
        echo "ok $tap_n - $tap_name"
    else
        echo "not ok $tap_n - $tap_name"
        {
            echo "# failed: $*"
            for tap_file in "$tmp/out" "$tmp/err"; do
                [ -f "$tap_file" ] && head -c 600 "$tap_file" | sed "s|^|# ${tap_file##*/}: |"
            done
        } >&2
    fi
}

skip() { # skip NAME REASON
    tap_n=$((tap_n + 1))
    echo "ok $tap_n - $1 # SKIP $2"
}

finish() {
    echo "1..$tap_n"
}

# try COMMAND...: runs it; leaves $status, $tmp/out, $tmp/err
try() {
    "$@" >"$tmp/out" 2>"$tmp/err"
    status=$?
}

# ready PID: waits until the program has its handler of SIGINT, which a shell's background job ignores before
ready() {
    while kill -0 "$1" 2>/dev/null && ! grep -qE '^SigCgt:.*[2367abef]$' "/proc/$1/status"; do sleep 0.05; done
}

# The last try ended with this status ...
exited() { [ "$status" -eq "$1" ]; }
# ... with one line on stderr, and that says ...
one_line() { [ "$(wc -l <"$tmp/err")" -eq 1 ] && grep -qF -e "$1" "$tmp/err"; }
# ... a failure as all should be: status, one line on stderr with this text, nothing on stdout
refused() { exited "$1" && one_line "$2" && [ ! -s "$tmp/out" ]; }
same() { cmp -s "$1" "$2"; }
is() { [ "$1" = "$2" ]; }
