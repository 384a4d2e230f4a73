#!/usr/bin/env bats
# Running programs on this machine.
load helper

setup() { cd "$BATS_TEST_TMPDIR"; }

# The path of the measure: every character that a shell could trip over
odd_path() { printf '%s' "$BATS_TEST_TMPDIR/a b/\$(id)/'x';*"; }

alive() { pgrep -f "$1" >/dev/null; }

@test "exec_and_log runs a program and drops what it prints" {
    for mode in "${MODES[@]}"; do
        driver it "$mode" <<<'exec_and_log "touch made"; exec_and_log "echo out"; exec_and_log "sh -c" x "echo noise >&2"
echo done'
        rm -f made
        call it
        quiet
        [ "$output" = 'done' ]
        [ -e made ]
    done
}

@test "exec_and_log splits at blanks and does nothing else to the command" {
    touch one.x two.x
    for mode in "${MODES[@]}"; do
        driver it "$mode" <<<'exec_and_log "cp -t .
	there *.x"'
        call it
        failed 1 "Error executing cp -t . 	there *.x"
        logged "'*.x'"
    done
}

@test "exec_and_log does what it says to a path with anything in it" {
    for mode in "${MODES[@]}"; do
        rm -rf "$BATS_TEST_TMPDIR/a b"
        mkdir -p "$(dirname "$(odd_path)")"
        touch "$(odd_path)" "$BATS_TEST_TMPDIR/other"
        chmod 600 "$(odd_path)" other
        driver it "$mode" <<<'exec_and_log "chmod g+w" "Cannot chmod $1" "$1"; exec_and_log "rm --" "Cannot remove $2" "$2"'
        call it "$(odd_path)" other
        quiet
        [ "$(stat -c %a "$(odd_path)")" = 620 ]
        [ ! -e other ]
        [ "$(find . -name x)" = "" ]
    done
}

@test "values arrive as whole words, whatever is in them" {
    driver it 'set -eu' <<<'exec_and_log "./show 1" "" "$@"'
    printf '#!/bin/sh\nfor word; do printf "<%%s>" "$word"; done >shown\n' >show
    chmod +x show
    call it "${NASTY[@]}"
    quiet
    [ "$(cat shown && echo .)" = "$(printf '<%s>' 1 "${NASTY[@]}" && echo .)" ]
}

@test "a failure is logged, told once, and ends the driver with the command's status" {
    for mode in "${MODES[@]}"; do
        driver it "$mode" <<<'exec_and_log "sh -c" "Cannot do it
 to $1" "echo out; echo one >&2; printf two\\\\n-3\\\\nERROR:4 >&2; exit 17"; echo not reached'
        call it 'x'
        failed 17 'Cannot do it  to x'
        logged one
        logged two
        logged -3
        logged ERROR:4
    done
}

@test "without a message it is Error executing" {
    driver it <<<'exec_and_log "ls -d" "" "$1"'
    call it /no/such
    failed 2 'Error executing ls -d'
    logged "cannot access '/no/such'"
}

@test "a program that is not there, cannot be run, dies of a signal" {
    touch plain
    for mode in "${MODES[@]}"; do
        driver it "$mode" <<<'exec_and_log "$1"'
        call it no-such-program
        failed 127 'Error executing no-such-program'
        logged 'command not found'
        call it ./plain
        failed 126
        driver it "$mode" <<<'exec_and_log "sh -c" No "kill -s $1 \$\$"'
        call it SEGV
        failed 139 No
        call it KILL
        failed 137 No
    done
}

@test "no command at all does not run the values" {
    driver it <<<'exec_and_log "" No touch made; echo not reached'
    call it
    failed 2
    [ ! -e made ]
    driver it 'set -eu' <<<'exec_and_log; echo not reached'
    call it
    failed 2
}

@test "in 3.4 the message of a failed command stands between the marks" {
    driver delete <<<'exec_and_log "ls /no/such" "Not there"'
    call delete h:/ds/0/7
    show
    [ "$status" = 2 ]
    [ "$(grep -v ^ERROR: <<<"$stderr")" = "ERROR MESSAGE --8<------
Not there
ERROR MESSAGE ------>8--" ]
}

@test "1 MiB of stderr does not hang anything, its end is logged" {
    SECONDS=0
    for mode in "${MODES[@]}"; do
        driver it "$mode" <<<'exec_and_log "sh -c" Much "yes 0123456789abcde | head -c 1048576 >&2; echo the end >&2; exit $1"'
        call it 3
        [ "$status" = 3 ]
        [ "$(untagged)" = Much ]
        logged 'the end'
        logged 'bytes before this are left out'
        [ "${#stderr}" -lt 200000 ]
        call it 0
        quiet
    done
    within 10
}

@test "NUL bytes and a missing end of line in stderr make no line of their own" {
    driver it <<<'exec_and_log "sh -c" No "printf a\\\\0b\\\\nc >&2; exit 1"'
    call it
    failed 1 No
    logged c
}

@test "what a command leaves running does not hold up the driver" {
    SECONDS=0
    driver it <<<'exec_and_log "sh -c" No "sleep 30.4321 & echo started >&2"'
    call it
    pkill -f 'sleep 30.4321'
    quiet
    within 5
}

@test "a driver's functions can be run, with its options and variables" {
    for mode in 'set -eu' 'set -euo pipefail'; do
        driver it "$mode" <<<'message=mine; words="my words"
make() { [ "$message $words" = "mine my words" ]; false; echo "not reached" >reached; }
exec_and_log make "Cannot make it" "$1"'
        call it x
        failed 1 'Cannot make it'
        [ ! -e reached ] # set -e holds in it
    done
    driver it <<<'make() { touch "made $1"; }; exec_and_log make "" "a b"; exec_and_log "eval touch" "" "also"'
    call it
    quiet
    [ -e 'made a b' ]
    [ -e also ]
}

@test "a function that uses the library itself is told once" {
    driver it <<<'f() { exec_and_log "ls /no/such" Inner; }; exec_and_log f Outer'
    call it
    failed 2 Outer
    logged Inner
}

@test "nothing is left in TMPDIR" {
    mkdir tmp
    driver it <<<'exec_and_log true; multiline_exec_and_log "echo \$1" "" x; exec_and_log false'
    TMPDIR=$PWD/tmp call it
    failed 1
    [ -z "$(ls -A tmp)" ]
    TMPDIR=$PWD/no-such call it
    failed 1
}

@test "timeout_exec_and_log in time" {
    for mode in "${MODES[@]}"; do
        driver it "$mode" <<<'timeout_exec_and_log 5 "touch" "" "$1"; timeout_exec_and_log 0.9 "echo x"; echo done'
        call it 'a *'
        quiet
        [ "$output" = 'done' ]
        [ -e 'a *' ]
        driver it "$mode" <<<'timeout_exec_and_log 5 "sh -c" "$1" "echo why >&2; exit $2"; echo not reached'
        call it 'My words' 9
        failed 9 'My words'
        logged why
        call it '' 143
        failed 143 'Error executing sh -c'
    done
}

@test "timeout_exec_and_log too late" {
    for mode in "${MODES[@]}"; do
        SECONDS=0
        driver it "$mode" <<<'timeout_exec_and_log 0.5 "sleep 30.1234"; echo not reached'
        call it
        failed 143 'Timeout executing sleep 30.1234'
        logged 'ended after 0.5 seconds'
        within 3
        run alive 'sleep 30.1234'
        [ "$status" = 1 ]
    done
    driver it <<<'timeout_exec_and_log 0.5 "sleep" "My words" 30'
    call it
    failed 143 'My words'
}

@test "what ignores TERM, and the children of what ran too long, are ended too" {
    SECONDS=0
    driver it <<<'timeout_exec_and_log 0.5 "bash -c" "Too long" "trap \"\" TERM; sleep 31.1234 & sleep 31.1234; sleep 31.1234"'
    call it
    failed 143 'Too long'
    within 6
    run alive 'sleep 31.1234'
    [ "$status" = 1 ]
    # the command itself ends at once, its child does not
    driver it <<<'timeout_exec_and_log 0.5 "bash -c" "Too long" "(trap \"\" TERM; exec sleep 32.1234) & sleep 33.1234"'
    call it
    failed 143 'Too long'
    run alive 'sleep 3[23].1234'
    [ "$status" = 1 ]
}

@test "a driver that is ended does not leave the timed command behind" {
    driver it <<<'timeout_exec_and_log 20 "sleep 34.1234"'
    setsid ./it 3>&- &
    local driver=$!
    for ((i = 0; i < 50; i++)); do
        if alive 'sleep 34.1234'; then break; fi
        sleep 0.1
    done
    alive 'sleep 34.1234'
    kill -TERM -- "-$driver"
    for ((i = 0; i < 40; i++)); do
        if ! alive 'sleep 34.1234'; then return 0; fi
        sleep 0.1
    done
    false
}

@test "timeout_exec_and_log wants a time and a command" {
    for seconds in '' 0 0.0 x -1 1x '1 2' 1e3; do
        driver it <<<'timeout_exec_and_log "$1" "touch made"; echo not reached'
        call it "$seconds"
        failed 2 "timeout_exec_and_log was given '$seconds' as a number of seconds"
    done
    driver it <<<'timeout_exec_and_log 1 "" No touch made; echo not reached'
    call it
    failed 2
    [ ! -e made ]
}

@test "a timed function, and one that reads stdin" {
    driver it 'set -eu' <<<'f() { cat; false; touch reached; }; timeout_exec_and_log 5 "f" "Not so"'
    call it <<<'input'
    failed 1 'Not so'
    [ ! -e reached ]
}

@test "multiline_exec_and_log" {
    for mode in "${MODES[@]}"; do
        rm -f made*
        driver it "$mode" <<<'multiline_exec_and_log "
            cat >/dev/null # finds nothing of the script
            touch \"\$1\"
            echo out
            false
            cat >made2 <<X
text
X
            echo \$LC_ALL >made3" "No" "$1"'
        call it 'made *'
        quiet
        [ -e 'made *' ]
        [ "$(cat made2 made3)" = $'text\nC' ]
        driver it "$mode" <<<'multiline_exec_and_log "set -e
            echo why >&2
            (exit 4)
            touch reached" "$1"; echo not reached'
        call it 'Not today'
        failed 4 'Not today'
        logged why
        call it ''
        failed 4 'Error executing a script'
        [ ! -e reached ]
        driver it "$mode" <<<'multiline_exec_and_log "if"; echo not reached' # is not a script
        call it
        failed 2
        driver it "$mode" <<<'multiline_exec_and_log ""; multiline_exec_and_log "# comment"; multiline_exec_and_log "true \\"'
        call it
        quiet
    done
}

@test "multiline_exec_and_log passes any value" {
    driver it 'set -eu' <<<'multiline_exec_and_log "for word; do printf \"<%s>\" \"\$word\"; done >shown" "" "$@"'
    call it "${NASTY[@]}" "$(odd_path)"
    quiet
    [ "$(cat shown && echo .)" = "$(printf '<%s>' "${NASTY[@]}" "$(odd_path)" && echo .)" ]
}

@test "exec_and_set_error and multiline_exec_and_set_error do not end the driver" {
    for mode in "${MODES[@]}"; do
        for function in exec_and_set_error multiline_exec_and_set_error; do
            driver it "$mode" <<<"$function"' "touch \"\$1\" | cat" "No" "$1"; printenv ERROR; '"$function"' "echo why >&2
 exit 3" "Sorry: $1"; echo "<$ERROR>"; '"$function"' "exit 3"; echo "<$ERROR>"; printenv ERROR >env; '"$function"' true; echo "<$ERROR>"'
            rm -f 'a *' env
            call it 'a *'
            show
            [ "$status" = 0 ]
            [ -e 'a *' ]
            [ -z "$(untagged)" ]
            logged why
            [ "$(sed -n '2p;4p' <<<"$output")" = $'<Sorry: a *>\n<>' ]
            [[ "$(sed -n 3p <<<"$output")" == "<Error executing "* ]]
            [[ "$(cat env)" == "Error executing "* ]]
        done
    done
}

@test "retry" {
    for mode in "${MODES[@]}"; do
        rm -f tries
        driver it "$mode" <<<'f() { echo out; echo try >>tries; echo "noise $1" >&2; [ "$(wc -l <tries)" -ge 2 ]; }
retry 3 f "a b"; echo done'
        call it
        quiet
        [ "$output" = 'done' ]
        [ "$(wc -l <tries)" = 2 ]
        driver it "$mode" <<<'f() { echo try >>tries; echo "noise $1" >&2; return 5; }
if retry 1 f "a  b"; then echo no; else error_message "gave up $?"; exit 6; fi'
        rm -f tries
        call it
        failed 6 'gave up 1'
        logged 'noise a  b'
        [ "$(wc -l <tries)" = 1 ]
    done
    driver it <<<'f() { exec_and_log "ls /no/such" "Not there"; }; retry 2 f || exit 1' # as stock drivers have it
    call it
    failed 1 'Not there'
}

@test "retry_if and retry_if_no_error repeat what says why" {
    printf '#!/bin/sh\necho try >>tries; [ "$(wc -l <tries)" -ge "$1" ] && { echo "two  words"; exit 0; }
echo partial; echo "active [block] job" >&2; exit 3\n' >program
    chmod +x program
    for mode in "${MODES[@]}"; do
        for function in retry_if retry_if_no_error; do
            driver it "$mode" <<<"$function"' "$1" 3 0.1 ./program "$2"; echo after'
            rm -f tries
            call it 'block. job' 3
            quiet
            [ "$output" = $'two  words\nafter' ]
            rm -f tries
            driver it "$mode" <<<"out=\$($function"' "$1" 3 0.1 ./program "$2") || { rc=$?; [ -s message ] || error_message "status $rc $out"; exit "$rc"; }; echo after' 2>/dev/null
            rm -f tries message
            [ $function = retry_if ] && echo x >message # it has told the user itself
            call it 'other' 3
            failed 3
            logged 'active [block] job'
            [ "$(wc -l <tries)" = 1 ]
            rm -f tries
            call it 'active' 9
            failed 3
            [ "$(wc -l <tries)" = 3 ]
        done
    done
}

@test "retry_if ends the driver only on failure, and tells the user once" {
    driver it <<<'retry_if "cannot access" 2 0.1 ls "$1"; echo not reached'
    call it /no/such
    failed 2 'Error executing ls'
    driver it <<<'retry_if "cannot access" 2 0.1 exec_and_log "ls" "Not there" "$1"; echo not reached'
    call it /no/such
    failed 2 'Not there'
    [ "$(grep -c 'Command .* failed' <<<"$stderr")" = 1 ]
}

@test "exclusive" {
    export MADRIGAL_LOCK_DIR=$PWD/locks
    mkdir locks
    for mode in "${MODES[@]}"; do
        driver it "$mode" <<<'f() { echo "in $1"; held=yes; return "$2"; }
exclusive name 1 f "a b" 0; echo "$held"; exclusive name 1 true; exclusive name 1 f x 5 && : || exit $?'
        call it
        show
        [ "$status" = 5 ]
        [ -z "$stderr" ]
        [ "$output" = $'in a b\nyes\nin x' ]
        [ "$(stat -c %a locks/name)" = 640 ]
    done
    driver it 'set -e' <<<'f() { false; echo not reached; }; exclusive name 1 f; echo not reached'
    call it
    [ "$status" = 1 ]
    [ -z "$output" ]
}

@test "exclusive waits for the others, for a while" {
    export MADRIGAL_LOCK_DIR=$PWD/locks
    mkdir locks
    driver it <<<'f() { read -r n <count; sleep 0.1; echo $((n + 1)) >count; }; exclusive count 20 f'
    echo 0 >count
    for ((i = 0; i < 8; i++)); do ./it 3>&- & done
    wait
    [ "$(cat count)" = 8 ]
    for mode in "${MODES[@]}"; do
        driver it "$mode" <<<'exclusive held 0.2 touch made; echo not reached'
        flock locks/held sleep 0.8 3>&- &
        sleep 0.3
        call it
        failed 254 "Could not acquire exclusive lock on $PWD/locks/held"
        logged "Could not acquire exclusive lock on $PWD/locks/held"
        [ ! -e made ]
        wait
    done
}

@test "exclusive lets go although a child still has the lock open" {
    export MADRIGAL_LOCK_DIR=$PWD/locks
    mkdir locks
    driver it <<<'f() { sleep 35.1234 >/dev/null 2>&1 & }; exclusive name 1 f; exclusive name 1 true; flock -n "$MADRIGAL_LOCK_DIR/name" true || exit 9'
    call it
    pkill -f 'sleep 35.1234'
    [ "$status" = 0 ]
}

@test "exclusive cannot lock outside its directory, nor where there is none" {
    for mode in "${MODES[@]}"; do
        export MADRIGAL_LOCK_DIR=$PWD
        driver it "$mode" <<<'exclusive "$1" 1 touch made; echo not reached'
        for name in ../x a/b ''; do
            call it "$name"
            failed 254
        done
        MADRIGAL_LOCK_DIR=$PWD/none call it x
        failed 254 "Could not create or open lock $PWD/none/x"
        [ ! -e made ]
    done
}

@test "monitor_and_log" {
    for mode in "${MODES[@]}"; do
        driver it "$mode" <<<'x=$(monitor_and_log "echo noise >&2
printf \"%s\n\" \"\$LC_ALL\" \"\$1\"" "Label" "$1"); echo "<$x>"; monitor_and_log "printf x"'
        call it "$(odd_path)"
        quiet
        [ "$output" = "<C
$(odd_path)>
x" ]
        driver it "$mode" <<<'x=$(monitor_and_log "echo half; echo why >&2; exit 6" "The monitor") || { rc=$?; error_message "No figures"; exit "$rc"; }'
        call it
        failed 6 'No figures'
        logged half
        logged why
        logged 'The monitor failed'
        driver it "$mode" <<<'monitor_and_log "printf a\\\\0b; false"; echo not reached'
        call it
        show
        [ "$status" = 1 ]
        [ -z "$output$(untagged)" ]
        driver it "$mode" <<<'monitor_and_log "printf a\\\\0b"'
        call it
        quiet
        [ "$output" = ab ]
    done
}
