#!/usr/bin/env bats
# Reaching hosts: real ones, each an sshd with a file system of its own (tests/rigs/hosts-up).
load helper

setup_file() {
    mkdir -p "$BATS_FILE_TMPDIR/ds"
    "$RIGS/hosts-up" "$BATS_FILE_TMPDIR/hosts" can || skip "this machine forbids hosts with file systems of their own"
    # Their home directories are their own too, for login shells that have something to say
    hosts_up "$BATS_FILE_TMPDIR/ds" "$HOME"
    for host in host01 host02; do
        on $host 'echo "echo welcome; printf noise; echo whisper >&2" >~/.bashrc; touch ~/.hushlogin'
    done
}
teardown_file() { hosts_down; }

setup() {
    DIR=$BATS_FILE_TMPDIR/ds/$BATS_TEST_NUMBER
    on host01 "mkdir -p $DIR" >/dev/null 2>&1
    cd "$BATS_TEST_TMPDIR"
}

# text COMMAND: what a plain ssh sees on host01, without what its login shell says
text() {
    local all
    all=$(on host01 "echo; echo MARK; $1" 2>/dev/null)
    all=${all#*MARK}
    printf '%s\n' "${all#$'\n'}"
}

@test "the rig's hosts are noisy and have files of their own" {
    [[ "$(on host01 true 2>&1)" == *welcome*whisper* ]]
    on host01 "touch $DIR/here" >/dev/null 2>&1
    [ "$(text "ls $DIR")" = here ]
    [ ! -e "$DIR/here" ]
}

@test "ssh_exec_and_log does what it says to a path with anything in it" {
    local path="$DIR/a b/\$(id)/'x';*"
    for mode in "${MODES[@]}"; do
        driver it "$mode" <<<'ssh_exec_and_log host01 "mkdir -p \"\${1%/*}\"; echo content >\"\$1\"; echo out" "No" "$1"
ssh_exec_and_log host01 "chmod 620 \"\$1\"" "" "$1"'
        call it "$path"
        quiet
        [ -z "$output" ]
        [ "$(text "cd $DIR && find . -type f -exec stat -c '%a %n' {} +")" = "620 ./a b/\$(id)/'x';*" ]
        driver it "$mode" <<<'ssh_exec_and_log host01 "rm -r -- \"\$1\"" "" "$1"'
        call it "$DIR/a b"
        quiet
        [ -z "$(text "ls -A $DIR")" ]
    done
    [ ! -e "$DIR/a b" ]
}

@test "values arrive as whole words, whatever is in them, in both forms" {
    for form in 3.4 current; do
        MADRIGAL_CONTRACT=$form
        export MADRIGAL_CONTRACT
        driver it 'set -eu' <<<'place=$1; shift
ssh_exec_and_log host01 "for word; do printf \"<%s>\" \"\$word\"; done >'"$DIR"'/shown" "" "$@"
ssh_exec_and_log host01 "echo \$# >>'"$DIR"'/shown"'
        call it x "${NASTY[@]}"
        quiet
        [ "$(text "cat $DIR/shown")" = "$(printf '<%s>' "${NASTY[@]}")0" ]
    done
}

@test "a script is for bash, in 3.4 for sh, and has the C locale" {
    driver it <<<'ssh_monitor_and_log host01 "echo \"\${BASH_VERSION:+bash} \$LANG \$LC_ALL\""'
    call it
    [ "$output" = 'bash C C' ]
    MADRIGAL_CONTRACT=3.4 call it
    case $(readlink -f /bin/sh) in */bash) ;; *) [ "$output" = ' C C' ] ;; esac
}

@test "a failure is logged, told once, and ends the driver with the script's status" {
    for mode in "${MODES[@]}"; do
        driver it "$mode" <<<'ssh_exec_and_log host01 "echo out; echo why >&2; printf more >&2; exit 17" "$1"; echo not reached'
        call it $'Cannot\ndo it'
        failed 17 'Cannot do it'
        logged 'Script on host01 failed (exit status 17)'
        logged why
        logged more
        call it ''
        failed 17 'Error executing a script on host01'
        driver it "$mode" <<<'ssh_exec_and_log host01 "set -e
false
touch '"$DIR"'/reached"; echo not reached'
        call it
        failed 1
    done
    [ -z "$(text "ls $DIR")" ]
}

@test "in 3.4 the message stands between the marks" {
    driver mvds <<<'ssh_exec_and_log host01 "exit 3" "Cannot move it"'
    call mvds host01:/ds/0/7/disk.0 /ds/1/x
    [ "$status" = 3 ]
    [ "$(grep -v '^ERROR: ' <<<"$stderr")" = "ERROR MESSAGE --8<------
Cannot move it
ERROR MESSAGE ------>8--" ]
}

@test "a script that cannot be parsed does not run at all; one may end in odd ways" {
    driver it <<<'ssh_exec_and_log host01 "$1" No; echo fine'
    call it "touch $DIR/reached
if"
    failed 2 No
    for script in '' '# comment' 'true \' 'cat <<X
text
X' 'cat; true' $'echo "\n}"' 'exit 0; false'; do
        call it "$script"
        quiet
        [ "$output" = fine ]
    done
    [ -z "$(text "ls $DIR")" ]
}

@test "what a script reads from stdin is not the rest of it" {
    driver it 'set -eu' <<<'ssh_exec_and_log host01 "cat >'"$DIR"'/stdin
touch '"$DIR"'/after"'
    call it <<<'not this either'
    quiet
    [ "$(text "cd $DIR; ls; cat stdin")" = $'after\nstdin' ]
}

@test "1 MiB of stderr, and a value of 1 MiB" {
    SECONDS=0
    driver it 'set -eu' <<<'ssh_exec_and_log host01 "yes 0123456789abcde | head -c 1048576 >&2; echo the end >&2; exit $1" Much'
    call it 0
    quiet
    call it 5
    [ "$status" = 5 ]
    [ "$(untagged)" = Much ]
    logged 'the end'
    driver it 'set -eu' <<<'value=$(head -c 1048576 /dev/zero | tr "\0" x)
ssh_exec_and_log host01 "printf %s \"\$1\" | wc -c >'"$DIR"'/count" "" "$value"'
    call it
    quiet
    [ "$(text "cat $DIR/count")" = 1048576 ]
    within 15
}

@test "a name that is none is refused before ssh sees it" {
    for mode in "${MODES[2]}" "${MODES[3]}"; do
        driver it "$mode" <<<'ssh_exec_and_log "$1" "true" "No"; echo not reached'
        for host in "-oProxyCommand=touch $BATS_TEST_TMPDIR/made" '' 'a b' 'host01;id' '$(id)' $'host01\n' 'x@-y' '*'; do
            call it "$host"
            failed 2
        done
    done
    [ ! -e made ]
}

@test "a host that is down is status 255 and a message, in bounded time" {
    "$RIGS/hosts-up" "$STATE" add host03 "$BATS_FILE_TMPDIR/ds" 3>&-
    driver it 'set -eu' <<<'ssh_exec_and_log host03 "true" "$1"; echo fine'
    call it ''
    [ "$output" = fine ]
    "$RIGS/hosts-up" "$STATE" end host03
    for mode in "${MODES[2]}" "${MODES[3]}"; do
        SECONDS=0
        driver it "$mode" <<<'ssh_exec_and_log host03 "true" "$1"; echo not reached'
        call it 'My words'
        failed 255 'My words'
        logged 'Connection refused'
        call it ''
        failed 255
        [[ "$(untagged)" == *host03* ]]
        within 10
    done
}

@test "a host that takes connections and says nothing is given up" {
    /usr/bin/python3 -c 'import socket, time
s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1], flush=True); time.sleep(60)' >port 3>&- &
    local server=$!
    until [ -s port ]; do sleep 0.1; done
    printf 'Host mute\n HostName 127.0.0.1\n Port %s\n' "$(cat port)" >config
    driver it <<<'ssh_exec_and_log mute "true" "Not there"; echo not reached'
    SECONDS=0
    MADRIGAL_SSH_CONFIG=$PWD/config MADRIGAL_CONNECT_TIMEOUT=1 call it
    kill $server
    failed 255 'Not there'
    within 8
}

@test "an unknown and a swapped host key are refused" {
    sed "s,$STATE/known_hosts,$PWD/none," "$STATE/ssh_config" >unknown
    sed "s,$STATE/known_hosts,$PWD/swapped," "$STATE/ssh_config" >other
    echo "host01 $(grep '^host02 ' "$STATE/known_hosts" | cut -d' ' -f2-)" >swapped
    driver it <<<'ssh_exec_and_log host01 "touch '"$DIR"'/made" "Not this one"; echo not reached'
    for config in unknown other; do
        SECONDS=0
        MADRIGAL_SSH_CONFIG=$PWD/$config call it
        failed 255 'Not this one'
        logged 'Host key verification failed'
        within 10
    done
    [ -z "$(text "ls $DIR")" ]
    [ ! -e none ]
}

@test "a configuration file with a blank in its name" {
    cp "$STATE/ssh_config" 'my config'
    driver it 'IFS=3' <<<'ssh_exec_and_log host01 true; echo fine'
    MADRIGAL_SSH_CONFIG="$PWD/my config" call it
    quiet
    [ "$output" = fine ]
}

@test "this machine is not reached by ssh" {
    export SSH=false MADRIGAL_FRONTEND='other fe.example.org'
    for host in localhost 127.0.0.1 "$(uname -n)" fe.example.org; do
        driver it 'set -eu' <<<'ssh_exec_and_log "$1" "echo \"\$1\" >made" "No" "$1"; ssh_monitor_and_log "$1" "cat made"'
        rm -f made
        call it "$host"
        quiet
        [ "$output" = "$host" ]
    done
    call it fe
    failed 1 No
}

@test "fifteen at once against an sshd that lets in ten" {
    driver it 'set -eu' <<<'ssh_exec_and_log host01 "echo x >>'"$DIR"'/lines" "Not let in"; echo fine'
    for ((i = 0; i < 15; i++)); do ./it >"out.$i" 2>&1 3>&- & done
    wait
    cat out.*
    [ "$(sort -u out.*)" = fine ]
    [ "$(text "wc -l <$DIR/lines")" = 15 ]
}

@test "a connection that ssh keeps open does not hold up the driver" {
    { cat "$STATE/ssh_config"; printf '  ControlMaster auto\n  ControlPath %s/%%n.sock\n  ControlPersist 40\n' "$BATS_FILE_TMPDIR"; } >config
    driver it <<<'ssh_exec_and_log host01 true; ssh_exec_and_log host01 "exit 4" Four'
    SECONDS=0
    MADRIGAL_SSH_CONFIG=$PWD/config call it
    ssh -F config -O exit host01
    failed 4 Four
    within 10
}

@test "ssh_exec_and_log_no_error returns the status" {
    for mode in "${MODES[2]}" "${MODES[3]}"; do
        driver it "$mode" <<<'rc=0; ssh_exec_and_log_no_error host01 "echo \"\$1\" >&2; exit 7" "$1" "$2" "a  b" || rc=$?; [ "$rc" = 7 ]
ssh_exec_and_log_no_error host01 true; echo after'
        call it 'No' 7
        quiet
        [ "$output" = after ]
        call it 'No' ''
        show
        [ "$output" = after ]
        [ "$(untagged)" = No ]
        logged 'a  b'
    done
}

@test "ssh_exec_and_log_stdin puts functions before the script" {
    printf 'greet() { echo "hello $1"; }' >'my functions'
    for mode in "${MODES[2]}" "${MODES[3]}"; do
        driver it "$mode" <<<'ssh_exec_and_log_stdin host01 "greet \"\$1\" >'"$DIR"'/greeting" "$1" "No" "a  b"; echo fine'
        call it 'my functions'
        quiet
        [ "$(text "cat $DIR/greeting")" = 'hello a  b' ]
        call it none
        failed 1 No
        driver it "$mode" <<<'ssh_exec_and_log_stdin host01 "greet; exit 6" "$1" "No"; echo fine'
        call it 'my functions'
        failed 6 No
    done
}

@test "ssh_monitor_and_log prints what the script prints and nothing else" {
    for mode in "${MODES[2]}" "${MODES[3]}"; do
        driver it "$mode" <<<'x=$(ssh_monitor_and_log host01 "echo noise >&2; printf \"%s\n\" \"\$1\" end" "Label" "$1"); echo "<$x>"'
        call it "a  'b'
\$c"
        quiet
        [ "$output" = "<a  'b'
\$c
end>" ]
        driver it "$mode" <<<'ssh_monitor_and_log host01 "echo half; echo why >&2; exit 6" "$1"; echo not reached'
        call it 'The monitor'
        show
        [ "$status" = 6 ]
        [ -z "$output$(untagged)" ]
        logged half
        logged why
        logged 'The monitor failed'
        driver it "$mode" <<<'x=$(ssh_monitor_and_log nowhere.invalid "true") || { error_message "No figures"; exit 9; }'
        call it
        failed 9 'No figures'
    done
}

@test "ssh_pipe carries data both ways, whatever login shells say" {
    head -c 3000000 /dev/urandom >data
    for host in host01 localhost; do
        on host01 "rm -rf '$DIR/x'" >/dev/null 2>&1
        driver it 'set -euo pipefail' <<<'put() { ssh_pipe "$1" "mkdir -p \"\${1%/*}\"; cat >\"\$1\"" "$2" <data; }
get() { ssh_pipe "$1" "cat \"\$1\"" "$2" >back; }
exec_and_log put "Cannot put" "$@"; exec_and_log get "Cannot get" "$@"'
        call it $host "$DIR/x/'a b' \$(id);*"
        quiet
        cmp data back
        rm -rf "$DIR/x"
    done
}

@test "ssh_pipe tells what failed" {
    for mode in "${MODES[2]}" "${MODES[3]}"; do
        driver it "$mode" <<<'f() { ssh_pipe "$1" "echo why >&2; exit \$1" "$2"; }; exec_and_log f "Cannot f" "$@"; echo not reached'
        call it host01 7
        failed 7 'Cannot f'
        logged why
        call it nowhere.invalid 7
        failed 255 'Cannot f'
        call it -oX 7
        failed 2 'Cannot f'
        driver it "$mode" <<<'f() { ssh_pipe host01 "head -c 1000000 /dev/zero" >/dev/full; }; exec_and_log f "Cannot f"'
        call it
        [ "$status" != 0 ]
        [ "$(untagged)" = 'Cannot f' ]
    done
}

@test "ssh_make_path" {
    for mode in "${MODES[2]}" "${MODES[3]}"; do
        driver it "$mode" <<<'ssh_make_path host01 "$1"; ssh_make_path host01 "$1"; echo fine'
        call it "$DIR/a b/*"
        quiet
        [ "$(text "cd $DIR && find . -mindepth 1")" = $'./a b\n./a b/*' ]
        call it /proc/none
        failed 1 'Error creating directory /proc/none at host01'
        logged 'cannot create directory'
    done
}

@test "enable_local_monitoring and disable_local_monitoring" {
    for mode in "${MODES[2]}" "${MODES[3]}"; do
        on host01 "mkdir -p '$DIR/a b/7'" >/dev/null 2>&1
        driver it "$mode" <<<'enable_local_monitoring host01 "$1" "$2"; echo fine'
        for name in ssh ssh lvm; do
            call it "$DIR//a b/7/" $name
            quiet
            [ "$(text "cd '$DIR/a b'; ls -A; cat .monitor")" = ".monitor
7
$name" ]
        done
        call it "$DIR/none/7" ssh
        failed 1 "Error creating $DIR/none/.monitor at host01"
        driver it "$mode" <<<'disable_local_monitoring host01 "$1"; disable_local_monitoring host01 "$1"; echo fine'
        call it "$DIR/a b/7"
        quiet
        [ "$(text "ls -A '$DIR/a b'")" = 7 ]
        call it "/proc/1/7"
        [ "$status" = 0 ]
    done
}

@test "ssh_forward replaces the client for one command" {
    eval "$(ssh-agent)" >/dev/null 3>&-
    ssh-add -q "$STATE/key"
    driver it 'set -eu' <<<'f() { ssh_monitor_and_log host01 "echo \"\$1 \${SSH_AUTH_SOCK:+agent}\"" "" "$1"; }
ssh_forward f "a  b"; f "a  b"; ssh_forward ssh_exec_and_log host01 "exit 4" Four'
    call it
    ssh-agent -k >/dev/null
    show
    [ "$output" = $'a  b agent\na  b ' ]
    [ "$status" = 4 ]
    [ "$(untagged)" = Four ]
}
