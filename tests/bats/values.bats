#!/usr/bin/env bats
# The functions that only make one text of another: paths, arguments, lists, XML, names, the commands of mkfs_command.
load helper

# is EXPECTED COMMAND...: what it prints, in every mode; quietly, with status 0
is() {
    local expected=$1 mode
    shift
    for mode in "${MODES[@]}"; do
        driver it "$mode" <<<'"$@"'
        call it "$@"
        echo "$* ($mode)"
        quiet
        [ "$output" = "$expected" ]
    done
}

# says STATUS COMMAND...: a predicate, in every mode
says() {
    local expected=$1 mode
    shift
    for mode in "${MODES[@]}"; do
        driver it "$mode" <<<'if "$@"; then exit 0; else exit 1; fi'
        call it "$@"
        echo "$* ($mode)"
        show
        [ "$status" = "$expected" ]
        [ -z "$output$stderr" ]
    done
}

@test "arg_host" {
    is host arg_host host:/a:b
    is 'a b' arg_host 'a b'
    is '' arg_host :/a
    is '*' arg_host '*:/x'
    is -n arg_host -n:/x
}

@test "arg_path" {
    is '/a b/:c' arg_path 'host://a b///:c/'
    is '//a//b/' arg_path host://a//b/ NOFIX
    is /a/b arg_path /a//b/
    is / arg_path h:/
    is "/'x';*" arg_path "h:/'x';*"
    is -e arg_path h:-e
    is '/a\b' arg_path 'h:/a\b'
}

@test "arguments survive any value" {
    for value in "${NASTY[@]}"; do
        driver it <<<'[ "$(arg_path "h:/d/$1x")" = "/d/$1x" ] && [ "$(arg_host "$1y")" = "$1y" ]'
        call it "${value//:/}"
        quiet
    done
}

@test "fix_dir_slashes" {
    is /a/b fix_dir_slashes ///a////b//
    is / fix_dir_slashes //
    is '' fix_dir_slashes ''
    is a/b fix_dir_slashes a//b/
}

@test "is_disk looks at the last part" {
    is 1 is_disk /ds/0/17/disk.0
    is 1 is_disk h:/ds//0/17/disk.12/
    is 0 is_disk /ds/0/17
    is 0 is_disk /ds/disk.1/0/17
    is 0 is_disk /ds/0/17/disk.
    is 0 is_disk /ds/0/17/disk.1x
    is 0 is_disk /ds/0/17/xdisk.1
    is 0 is_disk ''
}

@test "make_relative" {
    is ../1/abc make_relative /ds/1/abc /ds/0
    is abc make_relative /ds/1/abc /ds/1
    is ../../../srv/x make_relative /srv/x /ds/0/7
    is ds/x make_relative /ds/x /
    is '../a.c' make_relative /ds/a.c /ds/abc
    is '../[x' make_relative '/ds/[x' /ds/0
    is './-x' make_relative /ds/-x /ds
    is . make_relative /ds /ds/
}

@test "make_relative gives links that lead there" {
    cd "$BATS_TEST_TMPDIR"
    for value in "${NASTY[@]}"; do
        mkdir -p "1/d$value" 0/7
        echo "$value" >"1/d$value/$value.x"
        driver it <<<'ln -sfn -- "$(make_relative "$1" "$2")" "$2/link"'
        call it "$PWD/1/d$value/$value.x" "$PWD/0/7"
        quiet
        [ "$(cat 0/7/link)" = "$(echo "$value")" ]
    done
}

@test "set_ds_location reads the front-end's file and does not run it" {
    export ONE_LOCATION=$BATS_TEST_TMPDIR/one
    mkdir -p "$ONE_LOCATION/var"
    for mode in "${MODES[@]}"; do
        driver it "$mode" <<<'set_ds_location; printenv RMT_DS_DIR'
        rm -f "$ONE_LOCATION/var/config"
        call it
        quiet
        [ "$output" = "$ONE_LOCATION/var/datastores" ]
        printf 'X=1\nXDATASTORE_LOCATION=/no\nDATASTORE_LOCATION=/srv/a b//$(touch %s)/\nY=2' "$BATS_TEST_TMPDIR/run" \
            >"$ONE_LOCATION/var/config"
        call it
        quiet
        [ "$output" = "/srv/a b/\$(touch $BATS_TEST_TMPDIR/run)" ]
        [ ! -e "$BATS_TEST_TMPDIR/run" ]
        printf 'DATASTORE_LOCATION="/srv/ds"' >"$ONE_LOCATION/var/config"
        call it
        [ "$output" = /srv/ds ]
    done
}

@test "is_yes" {
    for value in yes YES true TRUE; do says 0 is_yes $value; done
    for value in no '' 1 'yes x' yesterday; do says 1 is_yes "$value"; done
    says 1 is_yes
}

@test "is_cdrom" {
    driver it 'set -eu' <<<'IMAGE_TYPE=$1; if is_cdrom; then echo y; else echo n; fi'
    call it 1
    [ "$output" = y ]
    call it 2
    [ "$output" = n ]
    says 1 is_cdrom
}

@test "contains" {
    says 0 contains ext2,ext3,ext4 ext3 ,
    says 0 contains 'ext2, ext3 ,ext4' ext3 ,
    says 0 contains 'a b c' c ' '
    says 0 contains 'a b c' b
    says 0 contains 'a::b' b ::
    says 0 contains '*,x' '*' ,
    says 1 contains ext2,ext3 ext ,
    says 1 contains ext2,ext3 'ext.' ,
    says 1 contains ext2,ext3 '*' ,
    says 1 contains ext2,ext3 ext2,ext3 ,
    says 1 contains '' x ,
    says 1 contains a,,b '' ,
}

@test "xml_esc gives what an XML parser reads back" {
    is '&lt;a b=&apos;&amp;amp;&quot;&gt;' xml_esc "<a b='&amp;\">"
    for value in "${NASTY[@]}" "&lt;'\"<>&"; do
        [ "$value" != $'\r' ] || continue # XML itself makes a newline of it
        driver it <<<'xml_esc "$1"'
        call it "$value"
        read_back=$(/usr/bin/python3 -c 'import sys, xml.etree.ElementTree as e
print(e.fromstring("<a b=\"x\">" + sys.argv[1] + "</a>").text or "")' "$output")
        [ "$read_back" = "$(printf '%s\n' "$value")" ]
    done
}

@test "iqn_get_host, iqn_get_vg_name, iqn_get_lv_name" {
    local iqn=iqn.2012-02.org.opennebula:san.example.org.vg-one.lv-one-17
    is san.example.org iqn_get_host $iqn
    is vg-one iqn_get_vg_name $iqn
    is lv-one-17 iqn_get_lv_name $iqn
}

# make ARGUMENT...: runs what mkfs_command prints, in the way drivers do
make() {
    driver it 'set -eu' <<<'multiline_exec_and_log "$(mkfs_command "$@")"'
    call it "$@"
    quiet
}
type_of() { blkid -p -s TYPE -o value "$1"; }

@test "mkfs_command makes images in any file" {
    PATH=$PATH:/sbin:/usr/sbin
    for value in "${NASTY[@]}"; do
        mkdir -p "$BATS_TEST_TMPDIR/d$value"
        file="$BATS_TEST_TMPDIR/d$value/disk.0$value"
        make "$file" raw 3
        [ "$(stat -c %s "$file")" = $((3 << 20)) ]
        make "$file" qcow2 3
        [ "$(head -c 3 "$file")" = QFI ]
        make "$file" raw 3 ext2,ext3 ext2 '-L a -m 1'
        [ "$(type_of "$file")" = ext2 ]
        [ "$(blkid -p -s LABEL -o value "$file")" = a ]
    done
}

@test "mkfs_command knows the ways of file systems, and swap" {
    PATH=$PATH:/sbin:/usr/sbin
    cd "$BATS_TEST_TMPDIR"
    make -f raw 8 ext4 ext4 # a file named -f
    [ "$(type_of ./-f)" = ext4 ]
    make a:b raw 8 vfat vfat
    [ "$(type_of a:b)" = vfat ]
    make x raw 320 xfs xfs
    [ "$(type_of x)" = xfs ]
    make x raw 320 xfs xfs # over it
    make s swap 8
    [ "$(type_of s)" = swap ]
    make q qcow2 8 ext4 ext4
    [ "$(head -c 3 q)" = QFI ]
    qemu-img convert -f qcow2 -O raw q q.raw
    [ "$(type_of q.raw)" = ext4 ]
    [ ! -e q.qcow2 ]
    make old ext3 8 # 3.4: FILE FS SIZE
    [ "$(type_of old)" = ext3 ]
}

@test "mkfs_command refuses before it makes anything of a name" {
    for fs in ext5 'ext4;touch run' '$(touch run)' 'ext4 ext4' '-t' '../ext4' 'ext4,ext3'; do
        for mode in "${MODES[@]}"; do
            cd "$BATS_TEST_TMPDIR"
            driver it "$mode" <<<'mkfs_command "$@"'
            call it disk raw 8 ext4,ext3 "$fs"
            show
            [ "$status" = 255 ]
            [ -z "$output$(untagged)" ]
            logged "Unsupported file system type: $fs. Supported types are: ext4,ext3"
            [ ! -e run ]
        done
    done
    driver it <<<'mkfs_command "$@"'
    call it disk raw 8 '$(touch run)' '$(touch run)' # in the list, and still no name of a file system
    [ "$status" = 255 ]
    for arguments in 'disk raw 8;x' 'disk vmdk 8 ext4 ext4' 'disk raw -1' 'disk vmdk_sparse 8'; do
        # shellcheck disable=SC2086 # words
        call it $arguments
        show
        [ "$status" = 255 ]
        [ -z "$output$(untagged)" ]
    done
    call it '' raw 8
    [ "$status" = 255 ]
}

@test "what mkfs_command prints fails if any part of it does, also in a script without set -e" {
    mkdir "$BATS_TEST_TMPDIR/disk" # cannot be made a file of
    driver it <<<'multiline_exec_and_log "$(mkfs_command "$1" raw 8 ext4 ext4)
echo later" Sorry; echo not reached'
    call it "$BATS_TEST_TMPDIR/disk/x/y"
    [ "$status" = 0 ] # as for any command that is not the last of a script
    driver it <<<'multiline_exec_and_log "set -e
$(mkfs_command "$1" raw 8 ext4 ext4)
echo later" Sorry; echo not reached'
    call it "$BATS_TEST_TMPDIR/disk/x/y"
    failed 1 Sorry
    driver it <<<'multiline_exec_and_log "$(mkfs_command "$1" raw 8 ext4 ext4 -Ono-such)" Sorry; echo not reached'
    call it "$BATS_TEST_TMPDIR/file"
    failed 1 Sorry
}
