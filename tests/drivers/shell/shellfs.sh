# shellcheck shell=bash disable=SC2016 # what stands in single quotes is for the shell on the host
# shellfs, a transfer manager driver in shell for hosts with storage of their own: what its actions share.
#
# It shows what scripts_common.sh is for and is tested with it: whole enough for the life of a VM, not for use.  Disks
# are copied through the front-end and do not grow; images are files, not directories or URLs; there are no snapshots.

set -euo pipefail
# shellcheck source=/dev/null # it is checked by itself
. "${MADRIGAL_SCRIPTS_COMMON:-$(dirname -- "$(realpath -- "${BASH_SOURCE[0]}")")/../../../scripts_common.sh}"

# shellcheck disable=SC2034 # for the actions
FRONT_END=localhost # images are its files, whatever name it has in the arguments

# fail STATUS TEXT
fail() {
    log_error "$2"
    error_message "$2"
    exit "$1"
}

# arguments USAGE COUNT...: how many there may be
arguments() {
    local usage=$1 count
    shift
    for count; do
        if [ "$ARGUMENTS" = "$count" ]; then return 0; fi
    done
    fail 2 "$ARGUMENTS arguments; usage: $SCRIPT_NAME $usage"
}
ARGUMENTS=$#

# place KIND PATH: ends the driver if PATH is not what an action may work on; KIND is image, disk or vm (disk or VM)
place() {
    local fits=no
    case $2/ in
        //* | [!/]* | */../*) ;;
        *) case $1:$(is_disk "$2"):${2##*/} in image:* | disk:1:* | vm:1:* | vm:0:[0-9]*) fits=yes ;; esac ;;
    esac
    [ $fits = yes ] || fail 2 "'$2' is not the path of a ${1/vm/disk or a VM}"
}

# Where a file is made before it gets its name
part_of() { printf '%s\n' "${1%/*}/.${1##*/}.shellfs.part"; }

_file() {
    ssh_pipe "$1" 'exec cat -- "$1"' "$2" </dev/null |
        ssh_pipe "$3" 'mkdir -p -- "${1%/*}" && exec dd of="$1" bs=64K iflag=fullblock conv=sparse,fsync status=none' "$4"
}

# copy_file HOST PATH HOST PATH: the target has its name only when all of it is there
copy_file() {
    local part
    part=$(part_of "$4")
    exec_and_log _file "Cannot copy $2 from $1 to $4 on $3" "$1" "$2" "$3" "$part"
    ssh_exec_and_log "$3" 'mv -fT -- "$1" "$2" && sync -- "${2%/*}"' "Cannot name $4 on $3" "$part" "$4"
}

_directory() {
    ssh_pipe "$1" 'exec tar -C "$1" -cSf - .' "$2" </dev/null |
        ssh_pipe "$3" 'rm -rf -- "$1" && mkdir -p -- "$1" && exec tar -C "$1" -xpSf -' "$4"
}

# copy_directory HOST PATH HOST PATH: the same; what was at the target before is gone then
copy_directory() {
    local part
    part=$(part_of "$4")
    exec_and_log _directory "Cannot copy $2 from $1 to $4 on $3" "$1" "$2" "$3" "$part"
    ssh_exec_and_log "$3" 'sync -f -- "$1" && rm -rf -- "$2" && mv -T -- "$1" "$2"' "Cannot name $4 on $3" "$part" "$4"
}
