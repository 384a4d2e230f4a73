#!/usr/bin/env bats
# Log lines, the message, the form of the call, and sourcing itself.
load helper

@test "log functions write SEVERITY: name: text" {
    for mode in "${MODES[@]}"; do
        driver clone.ssh "$mode" <<<'log one; log_info two; log_error three; log_debug four; log_function WARN five'
        call clone.ssh a b c d
        show
        [ "$status" = 0 ]
        [ -z "$output" ]
        [ "$stderr" = "INFO: clone.ssh: one
INFO: clone.ssh: two
ERROR: clone.ssh: three
DEBUG: clone.ssh: four
WARN: clone.ssh: five" ]
    done
}

@test "every line of a log text is tagged, whatever ends it" {
    driver mv <<<'log_error "a &
b \\1 %s"$'"'\r\nc\rd\n\n'"
    call mv a b c d
    show
    [ "$stderr" = 'ERROR: mv: a &
ERROR: mv: b \1 %s
ERROR: mv: c
ERROR: mv: d' ]
}

@test "an empty log text is a tagged line" {
    driver mv <<<'log ""; log'
    call mv
    [ "$(cat -A "$BATS_TEST_TMPDIR.err")" = 'INFO: mv: $
INFO: mv: $' ]
}

@test "log_date" {
    driver x <<<log_date
    call x
    [[ "$output" =~ ^[A-Z][a-z]{2}\ [A-Z][a-z]{2}\ [0-9]{2}\ [0-9:]{8}\ 20[0-9]{2}$ ]]
}

@test "error_message is one line that no front-end takes for something else" {
    for mode in "${MODES[@]}"; do
        driver cpds "$mode" <<<'error_message "$1"; exit 1'
        call cpds 'two  blanks %s \n stay'
        failed 1 'two  blanks %s \n stay'
        call cpds $'  a\nb\r\nc\n'
        failed 1 'a b  c'
        call cpds '-- no'
        failed 1 'cpds: -- no'
        call cpds ''
        failed 1 'failed without a reason'
        for text in 'ERROR: 12 x' 'INFO: x' 'WARN: x' 'DEBUG: x' 'ExitCode: 0'; do
            call cpds " $text"
            failed 1 "cpds: $text"
        done
    done
}

@test "in 3.4 the message stands between the marks" {
    export MADRIGAL_CONTRACT=3.4
    for mode in "${MODES[@]}"; do
        driver cpds "$mode" <<<'error_message "$1"; exit 3'
        call cpds $'File \'x\'\nnot found'
        show
        [ "$status" = 3 ]
        [ "$stderr" = "ERROR MESSAGE --8<------
File 'x' not found
ERROR MESSAGE ------>8--" ]
    done
}

# form NAME EXPECTED ARGUMENT...
form() {
    local name=$1 expected=$2
    shift 2
    driver "$name" "$mode" <<<'echo "$CONTRACT $(umask)"; error_message no; exit 7'
    umask 0022
    call "$name" "$@"
    echo "$name $* ($mode)"
    show
    [ "$status" = 7 ]
    if [ "$expected" = 3.4 ]; then
        [ "$output" = "3.4 0007" ]
        [ "$(wc -l <"$BATS_TEST_TMPDIR.err")" = 3 ]
    else
        [ "$output" = "current 0022" ]
        [ "$stderr" = no ]
    fi
}

@test "the form of a call is recognised as in docs/contract.md" {
    local disk=h:/ds/0/7/disk.0 dir=h:/ds/0/7
    for mode in '' "${MODES[3]}"; do
        for action in cp mkfs rm; do
            form $action 3.4 RFVNUA== 12
            form $action current 12
        done
        for action in stat monitor; do form $action current 12; done
        form clone current 12 # of a datastore
        for action in clone ln clone.ssh ln.ssh; do
            form $action 3.4 fe:/ds/1/abc $disk
            form $action 3.4 fe:/ds/1/abc $disk 512
            form $action current fe:/ds/1/abc $disk 7 1
        done
        form mv 3.4 $dir g:/ds/0/7
        form mv current $dir g:/ds/0/7 7 0
        form mvds 3.4 $disk /ds/1/abc
        form mvds current $disk /ds/1/abc 7 1
        form delete 3.4 $disk
        form delete current $disk 7 1
        form mkswap 3.4 64 $disk
        form mkswap 3.4 64 $disk 64
        form mkswap current 64 $disk 7 0
        form mkimage 3.4 64 ext3 $disk
        form mkimage 3.4 64 ext3 $disk 64
        form mkimage current 64 raw $disk 7 0
        form context 3.4 /var/7/context.sh $disk
        form context 3.4 /var/7/context.sh /a /b /c $disk
        form context current /var/7/context.sh $disk 7 0
        form context current /var/7/context.sh /a /b $disk 7 0
        form cpds current $disk /ds/1/abc -1 7 1
        form resize current $disk 512 7 1
        form premigrate current a b /ds/0/7 7 0
        form delete current # cannot be told
        form my-own current a b
    done
}

@test "MADRIGAL_CONTRACT decides over the arguments, and has to be known" {
    mode=
    MADRIGAL_CONTRACT=current form delete current h:/ds/0/7
    MADRIGAL_CONTRACT=3.4 form delete 3.4 h:/ds/0/7 7 0
    export MADRIGAL_CONTRACT=4
    driver delete <<<'echo not reached'
    call delete h:/ds/0/7
    failed 20 "MADRIGAL_CONTRACT is '4', expected 3.4 or current"
}

@test "sourcing says nothing and works in any mode" {
    for mode in "${MODES[@]}" 'set -o posix' 'set -f' 'IFS='; do
        driver clone "$mode" <<<'printf "%s|" "$@" "$SUDO" "$SED" "$LANG" "$LC_ALL" "$DS_DIR" "$ONE_SH" "$AWK" "$LVS"'
        unset ONE_LOCATION SUDO AWK
        LANG=de_DE.UTF-8 call clone "a b" '*'
        quiet
        [ "$output" = 'a b|*|sudo -n|sed -r|C|C|/var/lib/one/datastores|/usr/lib/one/sh|awk|lvs|' ]
    done
}

@test "sourcing honours what is set, and knows a front-end of its own" {
    driver x <<<'echo "$SUDO $AWK $ONE_LOCAL_VAR $ONE_LIB $DS_DIR $ONE_SH"'
    SUDO="doas -n" AWK=/opt/awk ONE_LOCATION=/opt/one call x
    [ "$output" = "doas -n /opt/awk /opt/one/var /opt/one/lib /opt/one/var/datastores /opt/one/lib/sh" ]
}

@test "system directories are searched too, after what the caller has in PATH" {
    driver x <<<'echo "$PATH"'
    PATH=/first:/usr/bin:/bin call x
    [ "$output" = /first:/usr/bin:/bin:/sbin:/usr/sbin ]
}

@test "a link to the library in another directory, named relatively, will do" {
    mkdir -p "$BATS_TEST_TMPDIR/remotes/tm/mine"
    ln -s "$LIBRARY" "$BATS_TEST_TMPDIR/remotes/scripts_common.sh"
    printf '#!/bin/bash\nset -eu\n. "${0%%/*}/../../scripts_common.sh"\nlog found\n' >"$BATS_TEST_TMPDIR/remotes/tm/mine/ln"
    chmod +x "$BATS_TEST_TMPDIR/remotes/tm/mine/ln"
    cd /
    call remotes/tm/mine/ln
    [ "$status" = 0 ]
    [ "$stderr" = "INFO: ln: found" ]
}

@test "the example of the header is a driver that works" {
    mkdir -p "$BATS_TEST_TMPDIR/tm/mine" "$BATS_TEST_TMPDIR/images"
    cp "$LIBRARY" "$BATS_TEST_TMPDIR"
    sed -n '/^#   #!/,/^#   \[ /{s/^# \{0,3\}//;p}' "$LIBRARY" >"$BATS_TEST_TMPDIR/tm/mine/ln"
    chmod +x "$BATS_TEST_TMPDIR/tm/mine/ln"
    echo content >"$BATS_TEST_TMPDIR/images/i"
    call tm/mine/ln "fe:$BATS_TEST_TMPDIR//images/i" "localhost:$BATS_TEST_TMPDIR/0/7/disk.0" 7 1
    show
    [ "$status" = 0 ]
    [ "$(cat "$BATS_TEST_TMPDIR/0/7/disk.0")" = content ]
    [ -e "$BATS_TEST_TMPDIR/images/i.used" ]
}

@test "shellcheck has nothing to say" {
    shellcheck "$LIBRARY" "$TOP"/tests/drivers/shell/tm/shellfs/* "$TOP"/tests/drivers/shell/*.sh
    run grep -nE 'shellcheck disable=[A-Z0-9,]+ *$' "$LIBRARY" # without a reason
    [ "$status" = 1 ]
}
