# Man pages and bash completion: made by the programs from their tables of options, complete, and without a warning.
. tests/tap.sh
commands=$("$LTN_BIN/ltn-bench" --help | sed -n 's/^Commands: \([a-z|]*\)\..*/\1/p' | tr '|' ' ')
programs="ltn-run ltn-score ltn-bench ltn-info ltn-convert $(for c in ${commands#model}; do echo "ltn-bench-$c"; done)"
# call PROGRAM OPTION...: a program, or a command of ltn-bench, by the name of its page
call() {
    called=$1
    shift
    case $called in
    ltn-convert) "$LTN_BIN/tools/convert" "$@" ;;
    ltn-bench-*) "$LTN_BIN/ltn-bench" "${called#ltn-bench-}" "$@" ;;
    *) "$LTN_BIN/$called" "$@" ;;
    esac
}
pass "the commands of ltn-bench" is "${commands%% *}" model

# every_option FILE: each option that --help lists begins a line of the page in FILE
every_option() {
    grep -oE '^ +(-[a-zA-Z0-9](, --[a-z-]+)?|--[a-z-]+)( |$)' "$tmp/help" | grep -oE -e '--?[a-zA-Z0-9-]+' >"$tmp/options"
    [ "$(wc -l <"$tmp/options")" -ge 3 ] || return 1
    while read -r option; do
        sed 's/\\-/-/g; s/\\f[BRI]//g' "$1" | grep -qE -e "^(-[a-zA-Z0-9], )?$option( |,|\$)" || return 1
    done <"$tmp/options"
}

for program in $programs; do
    call "$program" --help >"$tmp/help"
    try call "$program" --print-man
    cp "$tmp/out" "$tmp/$program.1"
    pass "$program: a man page" exited 0
    pass "$program: the page has every option" every_option "$tmp/$program.1"
    pass "$program: the page shows the defaults that --help shows" is \
        "$(tr '\n' ' ' <"$tmp/help" | tr -s ' ' | grep -oE '\(default: [^)]*\)' | tr -d ' ')" \
        "$(grep -oE '\(default: [^)]*\)' "$tmp/$program.1" | sed 's/\\-/-/g' | tr -d ' ')"
    for linter in "groff -man -Tutf8 -ww" "man --warnings -E UTF-8 -l -Tutf8 -Z"; do
        tool=${linter%% *}
        if command -v "$tool" >/dev/null 2>&1; then
            # shellcheck disable=SC2086
            try $linter "$tmp/$program.1"
            pass "$program: $tool has no warning" test "$status" = 0 -a ! -s "$tmp/err" -a -s "$tmp/out"
        else
            skip "man pages by $tool" "no $tool here"
        fi
    done
    try call "$program" --print-completion
    cp "$tmp/out" "$tmp/$program.bash"
    pass "$program: a completion" exited 0
done
pass "pages name each other" sh -c 'for p in $(grep -ohE "^\\\\fBltn[^(]*" "$1"/*.1 | sed "s/.fB//; s/.fR//; s/\\\\//g" | sort -u)
    do [ -f "$1/$p.1" ] || exit 1; done' sh "$tmp"
"$LTN_BIN/ltn-run" --print-man 2>"$tmp/err" >/dev/full
status=$?
: >"$tmp/out"
pass "a page to a full disk is an error" refused 1 "standard output: cannot write: No space left"
try "$LTN_BIN/ltn-run" --help
pass "--help does not list what makes the pages" sh -c '! grep -q print-man "$1"' sh "$tmp/out"

# completed WORD...: what bash is offered for the last of the words that begin with a program's name
completed() {
    bash -c '. "$0/$1.bash"; COMP_WORDS=("$@") COMP_CWORD=$(($# - 1)); "_${1//-/_}"; echo "${COMPREPLY[*]}"' "$tmp" "$@"
}
# offers EXPECTED WORD...
offers() {
    expected=$1
    shift
    pass "completion: $*" is "$(completed "$@" 2>&1)" "$expected"
}
if command -v bash >/dev/null 2>&1; then
    for program in $programs; do
        call "$program" --help >"$tmp/help"
        every=$(grep -oE '^ +(-[a-zA-Z0-9](, --[a-z-]+)?|--[a-z-]+)( |$)' "$tmp/help" | grep -oE -e '--?[a-zA-Z0-9-]+' | tr '\n' ' ')
        # shellcheck disable=SC2046
        offers "${every% }" $(echo "$program" | sed 's/^ltn-bench-/ltn-bench /') -
    done
    offers "--temp" ltn-run --tem
    offers "--top-k --top-p" ltn-run -p "a b" --top-
    offers "table csv json" ltn-bench --format ""
    offers "csv" ltn-bench --format c
    offers "csv" ltn-bench model --format c
    offers "$commands" ltn-bench ""
    offers "json" ltn-bench --format = j
    offers "table csv json" ltn-bench --format =
    offers "cpu cuda" ltn-run --device c
    offers "bf16" ltn-convert --dtype b
    offers "" ltn-run -n ""
    offers "" ltn-run -m ""
    offers "" ltn-run --frob
else
    skip "bash completion" "no bash here"
fi
finish
