# What the tests of scripts_common.sh share: small drivers written on the spot, and what a front-end makes of them.
# shellcheck shell=bash

TOP=$(cd "$BATS_TEST_DIRNAME/../.." && pwd)
export TOP
export LIBRARY=$TOP/scripts_common.sh
RIGS=$TOP/tests/rigs

# What a driver's own `set` and `shopt` may be: each test of a driver's behaviour goes through all of them
MODES=('' 'set -eu' 'set -euo pipefail' 'IFS=/:3; shopt -s nullglob failglob nocasematch; set -Cf')

# Values that break what is quoted badly
NASTY=("a b" "\$(id)" "'x';*" '"' '-rf' '--' '' $'two\nlines' '\' '&' '~' '`id`' $'tab\there' '*' '!x' '{a,b}' $'\r')

# driver NAME [MODE]: makes a driver of stdin that sources the library after MODE
driver() {
    {
        printf '#!/bin/bash\n%s\n. "$LIBRARY"\n' "${2:-}"
        cat
    } >"$BATS_TEST_TMPDIR/$1"
    chmod +x "$BATS_TEST_TMPDIR/$1"
}

# call NAME [ARGUMENT...]: runs it as a front-end does; status, output and stderr are what came of it
call() {
    local name=$1
    shift
    status=0
    "$BATS_TEST_TMPDIR/$name" "$@" >"$BATS_TEST_TMPDIR.out" 2>"$BATS_TEST_TMPDIR.err" 3>&- 4>&- || status=$?
    output=$(<"$BATS_TEST_TMPDIR.out")
    stderr=$(<"$BATS_TEST_TMPDIR.err")
}

# The lines of stderr that a front-end takes for the message
untagged() { grep -vE '^(ERROR|INFO|WARN|DEBUG): ' <<<"$stderr" || :; }

show() { printf 'status %s\n--- stdout\n%s\n--- stderr\n%s\n' "$status" "$output" "$stderr"; }

# The driver succeeded and said nothing
quiet() {
    show
    [ "$status" = 0 ]
    [ -z "$stderr" ]
}

# failed STATUS [MESSAGE]: it ended so, with exactly one message line, the last, and nothing on stdout
failed() {
    show
    [ "$status" = "$1" ]
    [ -z "$output" ]
    [ -n "$(untagged)" ]
    [ "$(untagged)" = "${stderr##*$'\n'}" ]
    [ $# -lt 2 ] || [ "$(untagged)" = "$2" ]
}

# logged TEXT: some log line has it
logged() { grep -E '^ERROR: ' <<<"$stderr" | grep -qF -e "$1"; }

# within SECONDS: no more have passed since the test began to count by SECONDS=0
within() { [ "$SECONDS" -le "$1" ] || { echo "took $SECONDS s"; return 1; }; }

# hosts_up [OPTION...] PATH...: starts the rig for a file of tests, in its setup_file.  What is started there must not
# keep bats' own descriptor 3.
hosts_up() {
    STATE=$BATS_FILE_TMPDIR/hosts
    "$RIGS/hosts-up" "$STATE" "$@" 3>&-
    export STATE MADRIGAL_SSH_CONFIG=$STATE/ssh_config
}
hosts_down() {
    for host in host01 host02; do on $host -O exit || :; done 2>/dev/null
    [ ! -d "$BATS_FILE_TMPDIR/hosts" ] || "$RIGS/hosts-down" "$BATS_FILE_TMPDIR/hosts"
}

# on HOST COMMAND: looks at a host with plain ssh, on a connection of its own, and not with what is on trial
on() {
    ssh -F "$STATE/ssh_config" -o ControlMaster=auto -o ControlPersist=60 -o "ControlPath=$BATS_FILE_TMPDIR/%n" "$@" 3>&-
}
