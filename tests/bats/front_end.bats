#!/usr/bin/env bats
# Asking today's front-end: here a stand-in for onevm, which prints a file and checks how it was asked.
load helper

setup() {
    cd "$BATS_TEST_TMPDIR"
    mkdir bin
    cat >vm.xml <<'XML'
<VM><ID>17</ID><LCM_STATE>3</LCM_STATE><TEMPLATE>
<DISK><DISK_ID><![CDATA[0]]></DISK_ID><TYPE><![CDATA[FILE]]></TYPE></DISK>
<DISK><DISK_ID><![CDATA[1]]></DISK_ID><TYPE><![CDATA[CDROM]]></TYPE></DISK>
<DISK><DISK_ID><![CDATA[11]]></DISK_ID><TYPE><![CDATA[a & ü]]></TYPE></DISK>
</TEMPLATE><HISTORY_RECORDS>
<HISTORY><HOSTNAME>host01</HOSTNAME></HISTORY><HISTORY><HOSTNAME>host02</HOSTNAME></HISTORY>
</HISTORY_RECORDS></VM>
XML
    printf '#!/bin/sh\n[ "$*" = "show -x 17" ] || { echo "VM not found" >&2; exit 255; }\ncat %s/vm.xml\n' "$PWD" >bin/onevm
    chmod +x bin/onevm
    PATH=$PWD/bin:$PATH
}

@test "lcm_state" {
    for mode in "${MODES[@]}"; do
        driver it "$mode" <<<'VMID=$1; x=$(lcm_state); y=$(lcm_state "$1"); echo "$x $y"'
        call it 17
        quiet
        [ "$output" = '3 3' ]
        driver it "$mode" <<<'x=$(lcm_state "$1") || { error_message "state $?<$x>"; exit 5; }'
        for id in 18 '' '17 -x' "17'" -x; do
            call it "$id"
            failed 5 'state 1<>'
        done
        call it 18
        logged 'VM not found'
    done
}

@test "disk_type" {
    for mode in "${MODES[@]}"; do
        driver it "$mode" <<<'VMID=17; DST_PATH=$1; disk_type'
        for expected in 0:FILE 1:CDROM '11:a & ü' 5:; do
            call it "/ds/0/17/disk.${expected%%:*}"
            quiet
            [ "$output" = "${expected#*:}" ]
        done
        call it "/ds/0/17/disk.0']|//*['"
        [ "$status" = 1 ]
        [ -z "$output$(untagged)" ]
    done
    driver it 'set -eu' <<<'disk_type'
    call it
    [ "$status" = 1 ]
}

@test "is_undeployed" {
    for mode in "${MODES[@]}"; do
        driver it "$mode" <<<'if is_undeployed 17 "$1"; then echo yes; else echo no; fi'
        call it host01
        quiet
        [ "$output" = yes ]
        call it host02
        [ "$output" = no ]
        driver it "$mode" <<<'if is_undeployed 99 host02; then echo yes; else echo no; fi'
        call it
        failed 1 'Cannot find out from the front-end where VM 99 is'
        logged 'VM not found'
    done
}

@test "an answer that is no XML, none in time, no onevm" {
    echo '<VM><broken' >vm.xml
    driver it <<<'is_undeployed 17 host02; echo not reached'
    call it
    failed 1
    logged 'onevm did not answer with XML'
    run grep -i traceback <<<"$stderr"
    [ "$status" = 1 ]
    printf '#!/bin/sh\nexec sleep 20\n' >bin/onevm
    SECONDS=0
    MADRIGAL_CONTROL_TIMEOUT=0.5 call it
    failed 1
    within 5
    rm bin/onevm
    call it
    failed 1
}
