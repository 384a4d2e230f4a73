#!/usr/bin/env bats
# A whole driver made of nothing but the library (tests/drivers/shell), run directly against hosts, in both forms.
load helper

TM=$TOP/tests/drivers/shell/tm/shellfs

setup_file() {
    DS=$BATS_FILE_TMPDIR/ds
    mkdir -p "$DS/1" "$DS/0"
    "$RIGS/hosts-up" "$BATS_FILE_TMPDIR/hosts" can || skip "this machine forbids hosts with file systems of their own"
    hosts_up -s 32m "$DS"
    # Another name for host01
    { cat "$STATE/host01/ssh_config"; echo '  HostKeyAlias host01'; } | sed 's/^Host host01/Host again/' >"$BATS_FILE_TMPDIR/config"
    cat "$STATE/ssh_config" >>"$BATS_FILE_TMPDIR/config"
    export DS MADRIGAL_SSH_CONFIG=$BATS_FILE_TMPDIR/config MADRIGAL_FRONTEND=fe LIBRARY
}
teardown_file() { hosts_down; }

setup() {
    cd "$BATS_TEST_TMPDIR"
    VM=$DS/0/17
    rm -rf "${DS:?}"/[01]/*
    { head -c 1000000 /dev/urandom; head -c 3000000 /dev/zero; head -c 100000 /dev/urandom; head -c 500000 /dev/zero; } >"$DS/1/image"
    head -c 2000000 /dev/urandom >"$DS/1/persistent"
    for host in host01 host02; do on $host "rm -rf $DS/*"; done
}

# tm ACTION ARGUMENT...: runs it in the form $FORM, twice: a repeated action ends as one does
tm() {
    local action=$1 try
    shift
    for try in 1 2; do
        status=0
        (cd / && "$TM/$action" "$@") >"$BATS_TEST_TMPDIR.out" 2>"$BATS_TEST_TMPDIR.err" 3>&- </dev/null || status=$?
        output=$(<"$BATS_TEST_TMPDIR.out")
        stderr=$(<"$BATS_TEST_TMPDIR.err")
        echo "$action $* ($FORM, $try)"
        show
        [ "$status" = "${EXPECT:-0}" ]
        [ -z "$output" ]
        if [ "$status" = 0 ]; then
            [ -z "$(untagged)" ]
        elif [ "$FORM" = 3.4 ]; then
            [ "$(untagged | sed -n '1p;3p')" = "ERROR MESSAGE --8<------
ERROR MESSAGE ------>8--" ]
            [ "$(untagged | wc -l)" = 3 ]
        else
            [ "$(untagged | wc -l)" = 1 ]
        fi
    done
}

# digests HOST NAME...: of files in the VM directory
digests() {
    local host=$1
    shift
    if [ "$host" = fe ]; then (cd "$VM" && sha256sum "$@"); else on "$host" "cd $VM && sha256sum $*"; fi
}

# life [VMID]: the words of today's form are the VM's id and $ds
life() {
    local ids=("$@") image_ids=("$@") all now
    [ $# = 0 ] || ids+=(0) image_ids+=(1)

    tm clone "fe:$DS//1/image" "host01:$VM/disk.0" "${image_ids[@]}"
    tm ln "fe:$DS/1/persistent" "host01:$VM/disk.1" "${image_ids[@]}"
    tm mkswap 2 "host01:$VM/disk.2" "${ids[@]}"
    if [ "$FORM" = 3.4 ]; then tm mkimage 4 ext3 "host01:$VM/disk.3"; else tm mkimage 4 qcow2 "host01:$VM/disk.3" "${ids[@]}"; fi
    echo 'A="b"' >context.sh
    echo 'my file' >'my file'
    tm context "$PWD/context.sh" "$PWD/my file:init.sh" "host01:$VM/disk.4" "${ids[@]}"
    names=(disk.0 disk.1 disk.2 disk.3 disk.4)
    all=$(digests host01 "${names[@]}")
    [ "$(cut -d' ' -f1 <<<"$all" | head -2)" = "$(cut -d' ' -f1 <(sha256sum "$DS/1/image" "$DS/1/persistent"))" ]
    [ "$(on host01 "PATH=\$PATH:/sbin:/usr/sbin blkid -p -s TYPE -o value $VM/disk.2 $VM/disk.4" | xargs)" = 'swap iso9660' ]
    [ "$(on host01 "isoinfo -J -i $VM/disk.4 -x /init.sh")" = 'my file' ]
    # holes stay holes
    [ "$(on host01 "stat -c %b $VM/disk.0")" -lt 4000 ]

    for move in host01:fe fe:host01 host01:host02; do # stop, resume, migrate
        for name in disk.0 disk.1 disk.2 disk.3; do
            tm mv "${move%:*}:$VM/$name" "${move#*:}:$VM/$name" "${ids[@]}"
        done
        tm mv "${move%:*}:$VM" "${move#*:}:$VM" "${ids[@]}"
        now=$(digests "${move#*:}" "${names[@]}")
        [ "$now" = "$all" ]
        if [ "${move%:*}" = fe ]; then [ ! -e "$VM" ]; else [ -z "$(on "${move%:*}" "ls -A $DS/0")" ]; fi
    done

    on host02 "echo 'the guest was here' >>$VM/disk.1"
    tm delete "host02:$VM/disk.0" "${image_ids[@]}"
    tm mvds "host02:$VM/disk.1" "$DS/1/persistent" "${image_ids[@]}"
    [ "$(tail -n 1 "$DS/1/persistent" | tail -c 19)" = 'the guest was here' ]
    [ "$(on host02 "ls $VM | grep -c 'disk.[0-9]$'")" = 4 ]
    tm delete "host02:$VM/" "${ids[@]}"
    for host in host01 host02; do [ -z "$(on $host "find $DS -type f -o -name '.*part'")" ]; done
    [ "$(ls -A "$DS/0" "$DS/1" | xargs)" = "$DS/0: $DS/1: image persistent" ]
}

@test "the life of a VM, 3.4" { FORM=3.4 life; }
@test "the life of a VM, today" { FORM=current life 17; }

@test "in 3.4 the context image has a second name, and what is made is not for others" {
    echo x >context.sh
    FORM=3.4 tm context "$PWD/context.sh" "host01:$VM/disk.1"
    [ "$(on host01 "readlink $VM/disk.1.iso; stat -c %a $DS/1 2>/dev/null; ls -A $VM")" = "disk.1
disk.1
disk.1.iso" ]
    FORM=3.4 tm delete "host01:$VM"
}

@test "names with anything in them" {
    VM="$DS/0/a b;'\$(id)'*/17"
    cp "$DS/1/image" "$DS/1/'x' \$(id);*"
    FORM=3.4 tm clone "fe:$DS/1/'x' \$(id);*" "host01:$VM/disk.0"
    FORM=3.4 tm mv "host01:$VM" "host02:$VM"
    [ "$(on host02 'cd '"$DS"'/0 && find . -type f')" = "./a b;'\$(id)'*/17/disk.0" ]
    FORM=3.4 tm mvds "host02:$VM/disk.0" "$DS/1/'y' \$(id);*"
    cmp "$DS/1/'x' \$(id);*" "$DS/1/'y' \$(id);*"
    FORM=3.4 tm delete "host02:$VM"
    [ "$(on host02 "find $DS/0 -mindepth 1" | wc -l)" = 1 ]
}

@test "two names of one directory: nothing is moved, nothing is lost" {
    FORM=current tm clone "fe:$DS/1/image" "host01:$VM/disk.0" 17 1
    before=$(digests host01 disk.0)
    FORM=current tm mv "host01:$VM" "again:$VM" 17 0
    [ "$(digests host01 disk.0)" = "$before" ]
    [ "$(on host01 "ls -A $VM")" = disk.0 ]
}

@test "a move that was interrupted when both were there is done again" {
    FORM=current tm clone "fe:$DS/1/image" "host01:$VM/disk.0" 17 1
    on host02 "mkdir -p $VM $DS/0/.17.shellfs.part; echo old >$VM/old; echo part >$DS/0/.17.shellfs.part/x"
    before=$(digests host01 disk.0)
    FORM=current tm mv "host01:$VM" "host02:$VM" 17 0
    [ "$(digests host02 disk.0)" = "$before" ]
    [ "$(on host02 "ls -A $DS/0 $VM" | xargs)" = "$DS/0: 17 $VM: disk.0" ]
}

@test "failures have one message and leave nothing under a final name" {
    head -c 40000000 /dev/urandom >"$DS/1/big"
    for FORM in 3.4 current; do
        if [ $FORM = 3.4 ]; then ids=(); else ids=(17 1); fi
        EXPECT=1 tm clone "fe:$DS/1/none" "host01:$VM/disk.0" "${ids[@]}"
        EXPECT=1 tm clone "fe:$DS/1/big" "host01:$VM/disk.0" "${ids[@]}" # on 32 MiB
        grep -q 'No space left' <<<"$stderr"
        EXPECT=255 tm clone "fe:$DS/1/image" "nowhere.invalid:$VM/disk.0" "${ids[@]}"
        EXPECT=1 tm mvds "host01:$VM/disk.0" "$DS/1/persistent" "${ids[@]}"
        EXPECT=2 tm mkimage x raw "host01:$VM/disk.0" "${ids[@]}"
        EXPECT=2 tm mkimage 4 'ext3;id' "host01:$VM/disk.0" "${ids[@]}"
        [ -z "$(on host01 "find $DS -name 'disk.*'")" ]
        tm delete "host01:$VM" "${ids[@]}"
        EXPECT=1 tm mv "host01:$VM" "host02:$DS/0/17" "${ids[@]}"
    done
    [ "$(stat -c %s "$DS/1/persistent")" = 2000000 ]
}

@test "bad arguments are refused by every action" {
    cd "$TM"
    for action in *; do
        for arguments in '' 'one' 'host01:relative/disk.0 host01:relative/disk.0 1 1' 'host01:/a/../disk.0 host01:/a/../disk.0' \
            '/1/image -oProxyCommand=x:/0/17/disk.0 17 0' '1 2 3 4 5 6 7'; do
            # shellcheck disable=SC2086 # words
            set -- $arguments
            status=0
            "./$action" "$@" >"$BATS_TEST_TMPDIR.out" 2>"$BATS_TEST_TMPDIR.err" </dev/null || status=$?
            stderr=$(<"$BATS_TEST_TMPDIR.err")
            echo "$action $arguments"
            show
            [ "$status" != 0 ]
            [ ! -s "$BATS_TEST_TMPDIR.out" ]
            [ "$(untagged | grep -vc '^ERROR MESSAGE')" = 1 ]
        done
    done
}

@test "it finds the library from a link in another tree, and where it is told" {
    mkdir -p tree/tm
    ln -s "$TM" tree/tm/shellfs
    FORM=current
    TM=$PWD/tree/tm/shellfs tm delete "host01:$VM" 17 0
    printf '. "%s"\nlog "by another library"\n' "$LIBRARY" >other.sh
    MADRIGAL_SCRIPTS_COMMON=$PWD/other.sh tm delete "host01:$VM" 17 0
    grep -q 'by another library' <<<"$stderr"
}
