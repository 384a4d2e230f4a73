# shellcheck shell=bash
# scripts_common.sh - what storage drivers written in shell are made of; for bash 4.4 or newer.
#
# A driver sources it first of all, at its top level, where "$@" is what the front-end gave:
#
#   #!/bin/bash
#   # Link a VM to an image on shared storage.  ln FE:SOURCE HOST:DISK [VMID DSID]
#   set -euo pipefail
#   . "${0%/*}/../../scripts_common.sh"
#
#   image=$(arg_path "$1")
#   host=$(arg_host "$2")
#   disk=$(arg_path "$2")
#
#   log "Linking $disk on $host to $image"
#   ssh_make_path "$host" "${disk%/*}"
#   ssh_exec_and_log "$host" 'ln -sfn -- "$1" "$2"' "Cannot link $disk on $host" "$image" "$disk"
#   [ "$CONTRACT" = 3.4 ] || exec_and_log "touch --" "Cannot note the use of $image" "$image.used"
#
# COMMAND and SCRIPT are the author's text and never made of data.  Data are VALUES, after the message: a command gets
# them as further arguments, a script as its "$1", "$2", ...; each arrives as one word whatever is in it.  What is
# about to fail says so itself: log lines with what the program said, one message for the user, and the end of the
# driver with the program's status; so call error_message only before an `exit` of your own.  Nothing a program
# prints reaches the front-end by itself.  The functions work with and without `set -eu` and need no special IFS.
# CONTRACT tells the form of the call (3.4 or current), found by the driver's name and the number of its arguments.
# Left from the environment: MADRIGAL_CONTRACT, MADRIGAL_SSH_CONFIG (as in ssh -F), MADRIGAL_CONNECT_TIMEOUT,
# MADRIGAL_CONTROL_TIMEOUT, MADRIGAL_FRONTEND (names of this machine), MADRIGAL_LOCK_DIR, and each variable below.

# The name in log lines
SCRIPT_NAME=${0##*/}

# ---------------------------------------------------------------------------------------------------------------------
# Logging, and the one message for the user
# ---------------------------------------------------------------------------------------------------------------------

# log_date: the date as log files have it
log_date() { date +'%a %b %d %T %Y'; }

# log_function SEVERITY TEXT: every line of TEXT gets the tag, because a front-end takes one without it for the message
log_function() {
    local tag="$1: $SCRIPT_NAME: " text=${2:-} newline=$'\n'
    text=${text//$'\r\n'/"$newline"}
    text=${text//$'\r'/"$newline"}
    while [[ $text == *"$newline" ]]; do text=${text%"$newline"}; done
    printf '%s\n' "$tag${text//"$newline"/"$newline$tag"}" >&2 || :
}

# log TEXT, log_info TEXT, log_error TEXT, log_debug TEXT
log() { log_function INFO "${1:-}"; }
log_info() { log_function INFO "${1:-}"; }
log_error() { log_function ERROR "${1:-}"; }
log_debug() { log_function DEBUG "${1:-}"; }

# error_message TEXT: tell the user why the driver failed.  To be called once, as the last thing before `exit`.
error_message() {
    local line=${1:-}
    # Today's front-ends glue lines together without a blank, so it has to be one
    line=${line//[$'\n\r']/ }
    line=${line#"${line%%[! ]*}"}
    line=${line%"${line##*[! ]}"}
    case ${line:=failed without a reason} in
        # what front-ends would read as no message, a log line, a status or the end of the message
        -* | ERROR:* | INFO:* | WARN:* | DEBUG:* | ExitCode:* | 'ERROR MESSAGE '*) line="$SCRIPT_NAME: $line" ;;
    esac
    if [ "$CONTRACT" = 3.4 ]; then
        printf '%s\n' 'ERROR MESSAGE --8<------' "$line" 'ERROR MESSAGE ------>8--' >&2 || :
    else
        printf '%s\n' "$line" >&2 || :
    fi
}

# ---------------------------------------------------------------------------------------------------------------------
# What is set when this file is sourced
# ---------------------------------------------------------------------------------------------------------------------

# The form of the call; docs/contract.md, "Two forms".  Where it cannot be told, today's.
_madrigal_contract() {
    local action=${SCRIPT_NAME%%.*} # clone.ssh is a clone
    CONTRACT=current
    case ${MADRIGAL_CONTRACT:-} in
        3.4 | current) CONTRACT=$MADRIGAL_CONTRACT ;;
        '')
            case $action/$# in
                cp/2 | mkfs/2 | rm/2 | mv/2 | mvds/2 | delete/1) CONTRACT=3.4 ;;
                clone/[23] | ln/[23] | mkswap/[23] | mkimage/[34]) CONTRACT=3.4 ;;
                context/*) if [[ ${!#} =~ :.*/disk\.[0-9]+$ ]]; then CONTRACT=3.4; fi ;; # else two numbers follow
            esac
            ;;
        *)
            error_message "MADRIGAL_CONTRACT is '$MADRIGAL_CONTRACT', expected 3.4 or current"
            exit 20
            ;;
    esac
    if [ "$CONTRACT" = 3.4 ]; then umask 0007; fi
}
_madrigal_contract "$@"

_madrigal_environment() {
    local name default directory
    for directory in /bin /sbin /usr/bin /usr/sbin; do
        case :${PATH:-}: in
            *:"$directory":*) ;;
            *) PATH=${PATH:+$PATH:}$directory ;;
        esac
    done
    # What programs say is read by programs; LC_ALL too, because it goes before LANG
    export PATH LANG=C LC_ALL=C
    # One variable for each program, for drivers to use without quotes: there may be options in it
    while IFS=' ' read -r name default; do
        [ -n "${!name:-}" ] || printf -v "$name" '%s' "$default"
    done <<'PROGRAMS'
AWK awk
CEPH ceph
CP cp
CUT cut
DATE date
DD dd
DF df
DU du
GREP grep
ISCSIADM iscsiadm
LN ln
LVCHANGE lvchange
LVCREATE lvcreate
LVEXTEND lvextend
LVREMOVE lvremove
LVS lvs
LVSCAN lvscan
MD5SUM md5sum
MKFS mkfs
MKISOFS mkisofs
MKSWAP mkswap
PYTHON3 python3
QEMU_IMG qemu-img
RADOS rados
RBD rbd
READLINK readlink
RM rm
SCP scp
SED sed -r
SSH ssh
SSH_FWD ssh -o ForwardAgent=yes -o ControlMaster=no -o ControlPath=none
SUDO sudo -n
SYNC sync
TAR tar
TGTADM tgtadm
TGTADMIN tgt-admin
TGTSETUPLUN tgt-setup-lun-one
TR tr
VGDISPLAY vgdisplay
VMKFSTOOLS vmkfstools
WGET wget
PROGRAMS
    ONE_LOCAL_VAR=${ONE_LOCATION:+${ONE_LOCATION%/}/var}
    ONE_LOCAL_VAR=${ONE_LOCAL_VAR:-/var/lib/one}
    ONE_LIB=${ONE_LOCATION:+${ONE_LOCATION%/}/lib}
    ONE_LIB=${ONE_LIB:-/usr/lib/one}
    # shellcheck disable=SC2034 # for drivers
    ONE_SH=$ONE_LIB/sh DS_DIR=$ONE_LOCAL_VAR/datastores
}
_madrigal_environment

# ---------------------------------------------------------------------------------------------------------------------
# Arguments and paths
# ---------------------------------------------------------------------------------------------------------------------

# arg_host HOST:PATH: the host; the whole argument if it has no colon
arg_host() { printf '%s\n' "${1%%:*}"; }

# arg_path HOST:PATH [NOFIX]: the path with its slashes tidied (not with NOFIX); the whole argument if it has no colon
arg_path() {
    if [ "${2:-}" = NOFIX ]; then
        printf '%s\n' "${1#*:}"
    else
        fix_dir_slashes "${1#*:}"
    fi
}

# fix_dir_slashes PATH: without doubled slashes and one at the end.  "" stays "", which stock drivers make "/".
fix_dir_slashes() {
    local path=${1:-}
    while [[ $path == *//* ]]; do path=${path//\/\//\/}; done
    [ "$path" = / ] || path=${path%/}
    printf '%s\n' "$path"
}

# is_disk PATH: prints 1 if it is a disk (.../disk.N), else 0.  Only the last part counts: a datastore may be
# mounted at /srv/disk.1, and a VM directory there that was taken for a disk would not be moved.
is_disk() {
    local path
    path=$(fix_dir_slashes "${1:-}")
    if [[ $path =~ /disk\.[0-9]+$ ]]; then echo 1; else echo 0; fi
}

# make_relative PATH DIRECTORY: PATH as a link in DIRECTORY needs it.  By words alone; stock drivers match one path
# with the other as a regular expression.
make_relative() {
    local path
    path=$(realpath -ms --relative-to="$2" -- "$1") || return
    case $path in -*) path=./$path ;; esac
    printf '%s\n' "$path"
}

# set_ds_location: RMT_DS_DIR becomes the datastores' directory on hosts, in 3.4 not always the front-end's.  The
# front-end's file is read and not run.
set_ds_location() {
    local line value=$DS_DIR
    if [ -r "$ONE_LOCAL_VAR/config" ]; then
        while IFS= read -r line || [ -n "$line" ]; do
            case $line in DATASTORE_LOCATION=?*) value=${line#*=} ;; esac
        done <"$ONE_LOCAL_VAR/config"
    fi
    case $value in \"*\" | \'*\') value=${value:1:-1} ;; esac
    RMT_DS_DIR=$(fix_dir_slashes "$value")
    export RMT_DS_DIR
}

# is_yes TEXT: whether it is yes, YES, true or TRUE
is_yes() { [[ ${1:-} =~ ^(yes|YES|true|TRUE)$ ]]; }

# contains LIST ELEMENT [SEPARATOR]: whether ELEMENT is in LIST; blanks around elements do not count
contains() {
    local rest=$1 element separator=${3:- }
    [ -n "${2:-}" ] || return 1
    while [ -n "$rest" ]; do
        element=${rest%%"$separator"*}
        case $rest in *"$separator"*) rest=${rest#*"$separator"} ;; *) rest= ;; esac
        element=${element#"${element%%[! ]*}"}
        element=${element%"${element##*[! ]}"}
        if [ "$element" = "$2" ]; then return 0; fi
    done
    return 1
}

# xml_esc TEXT: TEXT for XML.  The ampersand first: stock drivers escape their own escapes.
xml_esc() {
    local text=${1:-}
    # quoted, because bash 5.2 replaces a bare & by what was found
    text=${text//'&'/'&amp;'}
    text=${text//\'/'&apos;'}
    text=${text//\"/'&quot;'}
    text=${text//'<'/'&lt;'}
    text=${text//'>'/'&gt;'}
    printf '%s\n' "$text"
}

# iqn_get_host IQN, iqn_get_vg_name IQN, iqn_get_lv_name IQN: the parts of BASE:HOST.VG.LV
iqn_get_host() {
    local target=${1#*:}
    target=${target%.*}
    printf '%s\n' "${target%.*}"
}
iqn_get_vg_name() {
    local target=${1#*:}
    target=${target%.*}
    printf '%s\n' "${target##*.}"
}
iqn_get_lv_name() { printf '%s\n' "${1##*.}"; }

# is_cdrom: whether IMAGE_TYPE is that of a CD-ROM
is_cdrom() { [ "${IMAGE_TYPE:-}" = 1 ]; }

# mkfs_command FILE FORMAT SIZE_MB [SUPPORTED_FS FS [FS_OPTS]], in 3.4 FILE FS SIZE_MB: prints the shell command that
# makes an image; it is one command, which fails if any part does.  Ends with 255 if it cannot be made.
mkfs_command() {
    local file=$1 format=${2:-raw} size=${3:-0} supported=${4:-} fs=${5:-} options image commands
    IFS=$' \t\n' read -r -d '' -a options <<<"${6:-}" || :
    if [ $# -le 3 ]; then
        case $format in
            raw | qcow2 | swap) ;;
            *) fs=$format format=raw supported=ext2,ext3,ext4,xfs,ntfs,reiserfs,jfs ;;
        esac
    fi
    if [ -n "$fs" ] && ! { contains "$supported" "$fs" , && [[ $fs =~ ^[a-z0-9][a-z0-9_.+-]*$ ]]; }; then
        log_error "Unsupported file system type: $fs. Supported types are: $supported"
        exit 255
    fi
    if [[ ! $format =~ ^(raw|qcow2|swap)$ || ! $size =~ ^[0-9]+$ || -z $file ]]; then
        log_error "Cannot make an image '$file' of format '$format' and $size MiB"
        exit 255
    fi
    case $file in /*) ;; *) file=./$file ;; esac # neither an option nor a protocol to qemu-img
    case $fs in
        ext2 | ext3 | ext4 | ntfs) options=(-F "${options[@]}") ;;
        xfs | btrfs) options=(-f "${options[@]}") ;;
        reiserfs) options=(-f -q "${options[@]}") ;;
        jfs) options=(-q "${options[@]}") ;;
    esac
    _madrigal_quote "$file"
    image=$_madrigal_quoted
    if [ "$format" = swap ]; then
        commands="$QEMU_IMG create -f raw$image ${size}M &&"$'\n'"$MKSWAP -L swap$image"
    elif [ -z "$fs" ]; then
        commands="$QEMU_IMG create -f $format$image ${size}M"
    else
        _madrigal_quote "${options[@]}" "$file"
        commands="$QEMU_IMG create -f raw$image ${size}M &&"$'\n'"$MKFS -t $fs$_madrigal_quoted"
        if [ "$format" = qcow2 ]; then
            _madrigal_quote "$file.qcow2"
            commands+=" &&"$'\n'"$QEMU_IMG convert -f raw -O qcow2$image$_madrigal_quoted"
            commands+=" &&"$'\n'"mv -f --$_madrigal_quoted$image"
        fi
    fi
    # A subshell: `set -e` of whoever runs this sees its failure, which it would not see of a list
    printf '(\n%s\n)\n' "$commands"
}

# ---------------------------------------------------------------------------------------------------------------------
# Running programs.  Locals begin with _m_ where the author's functions run below them and would see them.
# ---------------------------------------------------------------------------------------------------------------------

# The only place where anything is quoted for a shell: _madrigal_quoted becomes the words, a blank before each
_madrigal_quote() {
    local word apostrophe="'\\''"
    _madrigal_quoted=
    for word; do _madrigal_quoted+=" '${word//\'/"$apostrophe"}'"; done
}

# The words of the author's text in the array _madrigal_words.  Not by an unquoted expansion, which globs too.
_madrigal_split() { IFS=$' \t\n' read -r -d '' -a _madrigal_words <<<"$1" || :; }

# Opens a file without a name for reading and writing; its number goes to the variable $1
_madrigal_scratch() {
    local _m_file _m_number
    _m_file=$(mktemp 2>&1) || _madrigal_refuse 1 "Cannot make a temporary file: $_m_file"
    exec {_m_number}<>"$_m_file"
    rm -f -- "$_m_file"
    printf -v "$1" '%s' "$_m_number"
}

_madrigal_refuse() {
    error_message "$2"
    exit "$1"
}

# Runs "$@" in a subshell and returns 0: its status goes to _madrigal_status and, if it failed, the end of its stderr
# to _madrigal_said.  By a file, because a pipe would be waited for as long as any child of the command keeps it open.
_madrigal_run() {
    local - _m_errors _m_flags=$- _m_most=65536 _m_size
    set +e
    _madrigal_scratch _m_errors
    (
        exec 2>&"$_m_errors" {_m_errors}>&-
        case $_m_flags in *e*) set -e ;; esac
        "$@"
        # so that this shell stays and not the driver's reports what died of a signal
        exit
    )
    _madrigal_status=$?
    _madrigal_said=
    if [ "$_madrigal_status" != 0 ]; then
        _madrigal_said=$(tail -c "$_m_most" "/dev/fd/$_m_errors" | tr -d '\0')
        _m_size=$(stat -L -c %s "/dev/fd/$_m_errors")
        [ "$_m_size" -le "$_m_most" ] || _madrigal_said="[$((_m_size - _m_most)) bytes before this are left out]
$_madrigal_said"
    fi
    exec {_m_errors}>&-
    return 0
}

# Whether what was said is a driver's word already, of a function that used this library
_madrigal_is_told() { [[ $'\n'$_madrigal_said == *$'\n'"ERROR: $SCRIPT_NAME: "* ]]; }

# Logs why WHAT failed; with MESSAGE, tells the user
_madrigal_failed() {
    local said=${_madrigal_said//"ERROR: $SCRIPT_NAME: "/}
    log_error "$1 failed (exit status $_madrigal_status)${said:+: $said}"
    [ -z "${2:-}" ] || error_message "$2"
}

# exec_and_log COMMAND [MESSAGE [VALUE...]]: run a program (or function); COMMAND is split at blanks and nothing else.
# Its stdout is dropped.  If it fails the driver ends with its status.
exec_and_log() {
    local _m_command=${1:-} _m_message=${2:-}
    shift "$(($# < 2 ? $# : 2))"
    _madrigal_split "$_m_command"
    [ "${#_madrigal_words[@]}" != 0 ] || _madrigal_refuse 2 "exec_and_log was given no command"
    _madrigal_run "${_madrigal_words[@]}" "$@" >/dev/null
    [ "$_madrigal_status" != 0 ] || return 0
    _madrigal_quote "$@"
    _madrigal_failed "Command '$_m_command$_madrigal_quoted'" "${_m_message:-Error executing $_m_command}"
    exit "$_madrigal_status"
}

# timeout_exec_and_log SECONDS COMMAND [MESSAGE [VALUE...]]: the same without stdin; after SECONDS the program and all
# of its process group are ended, and the driver with status 143
timeout_exec_and_log() {
    local _m_seconds=${1:-} _m_command=${2:-} _m_message=${3:-} _m_default
    shift "$(($# < 3 ? $# : 3))"
    [[ $_m_seconds =~ ^[0-9]{1,9}(\.[0-9]+)?$ && $_m_seconds =~ [1-9] ]] ||
        _madrigal_refuse 2 "timeout_exec_and_log was given '$_m_seconds' as a number of seconds"
    _madrigal_split "$_m_command"
    [ "${#_madrigal_words[@]}" != 0 ] || _madrigal_refuse 2 "timeout_exec_and_log was given no command"
    _madrigal_run _madrigal_timed "$_m_seconds" "${_madrigal_words[@]}" "$@" >/dev/null
    [ "$_madrigal_status" != 0 ] || return 0
    _m_default="Error executing $_m_command"
    case $_madrigal_status/$_madrigal_said in
        143/*"ended after $_m_seconds seconds") _m_default="Timeout executing $_m_command" ;;
    esac
    _madrigal_quote "$@"
    _madrigal_failed "Command '$_m_command$_madrigal_quoted'" "${_m_message:-$_m_default}"
    exit "$_madrigal_status"
}

# Runs in a subshell of its own, which outlives the driver if a front-end ends that alone, and keeps the time
_madrigal_timed() {
    local - _m_seconds=$1 _m_flags=$- _m_end _m_group=
    shift
    set +e
    trap '_madrigal_end_group "$_m_group"; exit 143' TERM
    trap '_madrigal_end_group "$_m_group"; exit 130' INT
    trap '_madrigal_end_group "$_m_group"; exit 129' HUP
    exec {_m_end}< <(
        trap - TERM INT HUP
        set -m # gives what it starts a process group
        (
            trap 'exit 143' TERM # after it has reaped what it waits for, so that no zombie is waited for below
            case $_m_flags in *e*) set -e ;; esac
            "$@"
            exit
        ) </dev/null >/dev/null &
        printf '%s\n' "$!"
        wait "$!" 2>/dev/null
        printf '%s\n' "$?"
    )
    IFS= read -r -u "$_m_end" _m_group
    if IFS= read -r -t "$_m_seconds" -u "$_m_end" _madrigal_status; then exit "$_madrigal_status"; fi
    _madrigal_end_group "$_m_group"
    printf 'ended after %s seconds\n' "$_m_seconds" >&2
    exit 143
}

# TERM, and KILL for what is still there two seconds later
_madrigal_end_group() {
    local try
    [ -n "$1" ] && kill -TERM -- "-$1" 2>/dev/null || return 0
    for ((try = 0; try < 20; try++)); do
        sleep 0.1
        kill -0 -- "-$1" 2>/dev/null || return 0
    done
    kill -KILL -- "-$1" 2>/dev/null || :
}

# multiline_exec_and_log SCRIPT [MESSAGE [VALUE...]]: the same for a bash script, whose status is that of its last
# command unless it begins with `set -e`
multiline_exec_and_log() {
    local script=${1:-} message=${2:-}
    shift "$(($# < 2 ? $# : 2))"
    _madrigal_script localhost "$script" "$@" >/dev/null
    [ "$_madrigal_status" != 0 ] || return 0
    _madrigal_failed "Script" "${message:-Error executing a script}"
    exit "$_madrigal_status"
}

# exec_and_set_error COMMAND [MESSAGE [VALUE...]], multiline_exec_and_set_error SCRIPT [MESSAGE [VALUE...]]: do not end
# the driver; ERROR becomes the message, "" if all went well.  COMMAND is shell text here, with VALUES as "$1", "$2", ...
exec_and_set_error() {
    local command=${1:-} message=${2:-}
    shift "$(($# < 2 ? $# : 2))"
    _madrigal_run bash -c "$command" bash "$@" >/dev/null
    _madrigal_set_error "Command '$command'" "${message:-Error executing $command}"
}
multiline_exec_and_set_error() {
    local script=${1:-} message=${2:-}
    shift "$(($# < 2 ? $# : 2))"
    _madrigal_script localhost "$script" "$@" >/dev/null
    _madrigal_set_error "Script" "${message:-Error executing a script}"
}
_madrigal_set_error() {
    export ERROR=
    [ "$_madrigal_status" != 0 ] || return 0
    _madrigal_failed "$1"
    ERROR=$2
}

# retry TIMES FUNCTION [VALUE...]: until it succeeds, a second apart; its stdout is dropped.  Returns 0 or 1; what the
# last try said is logged.
retry() {
    local _m_times=$1 _m_try
    _madrigal_split "$2"
    shift 2
    local -a _m_words=("${_madrigal_words[@]}" "$@") # the function may use this library
    for ((_m_try = 1; ; _m_try++)); do
        _madrigal_run "${_m_words[@]}" >/dev/null
        [ "$_madrigal_status" != 0 ] || return 0
        [ "$_m_try" -lt "$_m_times" ] || break
        sleep 1
    done
    _madrigal_relay
    return 1
}

# retry_if PATTERN TRIES SLEEP COMMAND...: run it again while it fails and its stderr matches the grep PATTERN; the
# stdout of the last try is passed on.  Ends the driver if that failed, and only then: stock drivers end in any case,
# and what follows there is never reached.
retry_if() {
    _madrigal_retry_if "$@"
    [ "$_madrigal_status" != 0 ] || return 0
    _madrigal_is_told || error_message "Error executing ${*:4:1}"
    exit "$_madrigal_status"
}

# retry_if_no_error PATTERN TRIES SLEEP COMMAND...: the same, but returns the status and leaves the message to you
retry_if_no_error() {
    _madrigal_retry_if "$@"
    return "$_madrigal_status"
}

_madrigal_retry_if() {
    local _m_pattern=$1 _m_tries=$2 _m_sleep=$3 _m_output
    shift 3
    while :; do
        _madrigal_scratch _m_output
        _madrigal_run "$@" >&"$_m_output" {_m_output}>&-
        _m_tries=$((_m_tries - 1))
        if [ "$_madrigal_status" = 0 ] || [ "$_m_tries" -le 0 ] ||
            ! grep -q -e "$_m_pattern" <<<"$_madrigal_said"; then break; fi
        exec {_m_output}>&-
        sleep "$_m_sleep"
    done
    cat "/dev/fd/$_m_output"
    exec {_m_output}>&-
    [ "$_madrigal_status" = 0 ] || _madrigal_relay
}

# Passes on what a failed command said: as it is if it is a driver's word already, else as log lines
_madrigal_relay() {
    if _madrigal_is_told; then
        printf '%s\n' "$_madrigal_said" >&2
    elif [ -n "$_madrigal_said" ]; then
        log_error "$_madrigal_said"
    fi
}

# exclusive NAME SECONDS COMMAND...: run it while holding the lock /var/lock/one/NAME; returns its status.  Ends the
# driver with 254 if the lock cannot be had in SECONDS, and says so to the user, whom stock drivers leave without a word.
exclusive() {
    local _m_name=$1 _m_seconds=$2 _m_lock _m_status _m_file
    shift 2
    _m_file=${MADRIGAL_LOCK_DIR:-/var/lock/one}/$_m_name
    if [[ $_m_name == */* || -z $_m_name ]] ||
        ! { (umask 0027 && : >>"$_m_file") && exec {_m_lock}>>"$_m_file"; } 2>/dev/null; then
        log_error "Could not create or open lock $_m_file"
        _madrigal_refuse 254 "Could not create or open lock $_m_file"
    fi
    if ! flock -w "$_m_seconds" "$_m_lock" 2>/dev/null; then
        log_error "Could not acquire exclusive lock on $_m_file"
        _madrigal_refuse 254 "Could not acquire exclusive lock on $_m_file"
    fi
    "$@"
    _m_status=$?
    flock -u "$_m_lock" # by name: a child may still have it open
    exec {_m_lock}>&-
    return "$_m_status"
}

# ---------------------------------------------------------------------------------------------------------------------
# Hosts.  One that is this machine (its hostname, localhost, a name in MADRIGAL_FRONTEND) is not reached by ssh.
# ---------------------------------------------------------------------------------------------------------------------

# What a script prints before anything else, to both its outputs: before it is only what login shells and ssh said
_madrigal_mark=__the_script_has_started__

# The words that run a command on HOST in the array _madrigal_via; none for this machine
_madrigal_reach() {
    local host=${1:-} own='' pattern='^([A-Za-z0-9_][A-Za-z0-9._-]*@)?[A-Za-z0-9_:[][]A-Za-z0-9._:%[-]*$'
    [[ $host =~ $pattern ]] || _madrigal_refuse 2 "'$host' is not the name of a host"
    IFS= read -r own </proc/sys/kernel/hostname || :
    _madrigal_via=()
    case " localhost 127.0.0.1 $own ${MADRIGAL_FRONTEND:-} " in *" $host "*) return 0 ;; esac
    _madrigal_split "${SSH:-ssh}"
    _madrigal_via=("${_madrigal_words[@]}")
    [ -z "${MADRIGAL_SSH_CONFIG:-}" ] || _madrigal_via+=(-F "$MADRIGAL_SSH_CONFIG")
    _madrigal_via+=(-o BatchMode=yes -o "ConnectTimeout=${MADRIGAL_CONNECT_TIMEOUT:-20}" -o ServerAliveInterval=15
        -o ServerAliveCountMax=4 -o ClearAllForwardings=yes -o RequestTTY=no -o LogLevel=ERROR -- "$host")
}

# Runs SCRIPT on a host with VALUES, as _madrigal_run does.  The script goes through stdin, so that the
# login shell there, whichever it is, has nothing to understand; it is read whole before any of it runs, so that a
# broken connection cannot run the first half, and what it starts finds nothing of it on stdin.
_madrigal_script() {
    local host=$1 shell=bash text try
    _madrigal_reach "$host"
    _madrigal_quote "${@:3}"
    text="set --$_madrigal_quoted
PATH=\$PATH:/usr/sbin:/sbin
echo $_madrigal_mark
echo $_madrigal_mark >&2
{ :
$2

}"
    if [ "${#_madrigal_via[@]}" = 0 ]; then
        _madrigal_run env LANG=C LC_ALL=C bash -s <<<"$text"
    else
        if [ "$CONTRACT" = 3.4 ]; then shell='sh'; fi
        for ((try = 1; ; try++)); do
            _madrigal_run "${_madrigal_via[@]}" "exec env LANG=C LC_ALL=C $shell -s" <<<"$text"
            # sshd drops connections at random when ten log in at once, before it says anything
            case $_madrigal_status/$_madrigal_said in
                255/*"$_madrigal_mark"*) break ;;
                255/*kex_exchange_identification* | 255/*'Connection reset by '* | 255/*'Connection closed by '*) ;;
                *) break ;;
            esac
            if [ "$try" -ge 6 ] || [ "${#_madrigal_said}" -ge 4096 ]; then break; fi
            sleep "$((try / 2)).$((RANDOM % 10))"
        done
    fi
    _madrigal_said=${_madrigal_said/"$_madrigal_mark"$'\n'/}
    _madrigal_said=${_madrigal_said%"$_madrigal_mark"}
    _madrigal_said=${_madrigal_said%$'\n'}
}

# ssh_exec_and_log HOST SCRIPT [MESSAGE [VALUE...]]: run SCRIPT there (bash, in 3.4 sh; C locale); its status is that of
# its last command unless it begins with `set -e`, 255 if ssh itself failed.  If it fails the driver ends with its status.
ssh_exec_and_log() {
    local host=${1:-} script=${2:-} message=${3:-}
    shift "$(($# < 3 ? $# : 3))"
    _madrigal_ssh "$host" "$script" "$message" '' "$@"
    [ "$_madrigal_status" = 0 ] || exit "$_madrigal_status"
}

# ssh_exec_and_log_no_error HOST SCRIPT [MESSAGE [OK_STATUS [VALUE...]]]: the same, but returns the status; OK_STATUS is
# no failure and not logged
ssh_exec_and_log_no_error() {
    local host=${1:-} script=${2:-} message=${3:-} fine=${4:-}
    shift "$(($# < 4 ? $# : 4))"
    _madrigal_ssh "$host" "$script" "$message" "$fine" "$@"
    return "$_madrigal_status"
}

# ssh_exec_and_log_stdin HOST SCRIPT FILE MESSAGE [VALUE...]: as ssh_exec_and_log, with the content of FILE (functions)
# before SCRIPT
ssh_exec_and_log_stdin() {
    local host=${1:-} script=${2:-} file=${3:-} message=${4:-} functions
    shift "$(($# < 4 ? $# : 4))"
    if [ ! -f "$file" ] || [ ! -r "$file" ]; then
        log_error "Cannot read $file"
        _madrigal_refuse 1 "${message:-Cannot read $file}"
    fi
    functions=$(<"$file")
    _madrigal_ssh "$host" "$functions
$script" "$message" '' "$@"
    [ "$_madrigal_status" = 0 ] || exit "$_madrigal_status"
}

_madrigal_ssh() {
    _madrigal_script "$1" "$2" "${@:5}" >/dev/null
    case $_madrigal_status in 0 | "${4:-0}") return 0 ;; esac
    _madrigal_failed "Script on $1" "${3:-Error executing a script on $1}"
}

# ssh_monitor_and_log HOST SCRIPT [LABEL [VALUE...]]: prints what SCRIPT prints there.  If it fails, LABEL and all that
# was said are logged, and the driver (within `$(...)`: this subshell) ends with its status, without a message.
ssh_monitor_and_log() {
    local host=${1:-} script=${2:-} label=${3:-} output status=0
    shift "$(($# < 3 ? $# : 3))"
    output=$(
        {
            _madrigal_script "$host" "$script" "$@"
            if [ "$_madrigal_status" != 0 ]; then
                _madrigal_failed "${label:-Script on $host}"
            fi
            exit "$_madrigal_status"
        } | tr -d '\0'
        exit "${PIPESTATUS[0]}"
    ) || status=$?
    output=${output#*"$_madrigal_mark"}
    output=${output#$'\n'}
    if [ "$status" != 0 ]; then
        [ -z "$output" ] || log_error "It printed: $output"
        exit "$status"
    fi
    printf '%s\n' "$output"
}

# monitor_and_log SCRIPT [LABEL [VALUE...]]: the same on this machine
monitor_and_log() {
    local script=${1:-} label=${2:-Script}
    shift "$(($# < 2 ? $# : 2))"
    ssh_monitor_and_log localhost "$script" "$label" "$@"
}

# ssh_pipe HOST SCRIPT [VALUE...]: run a short bash SCRIPT there with our stdin and stdout as its own, for data:
#   save() { set -o pipefail; tar -C "$1" -cSf - . | ssh_pipe "$2" 'tar -C "$1" -xSf -' "$3"; }
#   exec_and_log save "Cannot copy $from to $host" "$from" "$host" "$to"
# Its stderr is not caught: use it in a function that exec_and_log runs.  Returns the status, 255 if ssh itself failed.
ssh_pipe() {
    local - command
    set +e
    local -a statuses
    _madrigal_reach "${1:-}"
    if [ "${#_madrigal_via[@]}" = 0 ]; then
        env LANG=C LC_ALL=C bash -c "$2" bash "${@:3}"
        return
    fi
    _madrigal_quote "PATH=\$PATH:/usr/sbin:/sbin; echo $_madrigal_mark"$'\n'"$2" bash "${@:3}"
    command="exec env LANG=C LC_ALL=C bash -c$_madrigal_quoted"
    "${_madrigal_via[@]}" "$command" | _madrigal_after_mark
    statuses=("${PIPESTATUS[@]}")
    [ "${statuses[0]}" = 0 ] || return "${statuses[0]}"
    return "${statuses[1]}"
}

_madrigal_after_mark() {
    local line
    while IFS= read -r line; do
        if [[ $line == *"$_madrigal_mark" ]]; then break; fi
    done
    cat
}

# ssh_forward COMMAND...: run one of these functions with agent forwarding, on a connection of its own
ssh_forward() {
    local SSH=$SSH_FWD
    "$@"
}

# ssh_make_path HOST DIRECTORY: make it there if it is not.  Ends the driver if it cannot, which 3.4's never noticed.
# shellcheck disable=SC2016 # for the shell on the host
ssh_make_path() { ssh_exec_and_log "$1" 'mkdir -p -- "$1"' "Error creating directory $2 at $1" "$2"; }

# enable_local_monitoring HOST VM_DIR TM, disable_local_monitoring HOST VM_DIR: whether the host, with the probe of
# driver TM, is asked for the sizes of the disks in VM_DIR's datastore
enable_local_monitoring() {
    local directory
    directory=$(fix_dir_slashes "$2")
    # shellcheck disable=SC2016 # for the shell on the host
    ssh_exec_and_log "$1" '
        set -e
        [ "$(cat "$1/.monitor" 2>/dev/null)" != "$2" ] || exit 0
        printf "%s\n" "$2" >"$1/..monitor.$$.part"
        mv -f -- "$1/..monitor.$$.part" "$1/.monitor"
    ' "Error creating ${directory%/*}/.monitor at $1" "${directory%/*}" "$3"
}
disable_local_monitoring() {
    local directory
    directory=$(fix_dir_slashes "$2")
    # shellcheck disable=SC2016 # for the shell on the host
    ssh_exec_and_log "$1" 'rm -f -- "$1/.monitor"' "Error removing ${directory%/*}/.monitor at $1" "${directory%/*}"
}

# ---------------------------------------------------------------------------------------------------------------------
# Asking the front-end (today's)
# ---------------------------------------------------------------------------------------------------------------------

# VMID and a path below /VM: _madrigal_answer becomes the text of that element of `onevm show -x`.  By Python's own XML
# library, because it is there wherever these drivers run and xmllint is not; the path is an argument and the document
# comes on stdin, so that nothing of either is made code.
_madrigal_vm() {
    if [[ ! ${1:-} =~ ^[0-9]+$ ]]; then
        log_error "'${1:-}' is not the id of a VM"
        return 1
    fi
    _madrigal_answer=$(
        _madrigal_run _madrigal_ask "$1" "$2"
        [ "$_madrigal_status" = 0 ] || _madrigal_failed "Asking the front-end about VM $1"
        exit "$_madrigal_status"
    )
}

_madrigal_ask() {
    local document
    document=$(timeout "${MADRIGAL_CONTROL_TIMEOUT:-60}" onevm show -x "$1") || return
    _madrigal_split "$PYTHON3"
    "${_madrigal_words[@]}" -I -c '
import sys, xml.etree.ElementTree as tree
try:
    found = tree.parse(sys.stdin.buffer).getroot().find(sys.argv[1])
except tree.ParseError as error:
    sys.exit(f"onevm did not answer with XML: {error}")
sys.stdout.buffer.write(((found.text or "") if found is not None else "").encode() + b"\n")
' "$2" <<<"$document"
}

# lcm_state [VMID]: its LCM_STATE.  Without VMID: of $VMID.  Returns 1 and prints nothing if the front-end does not tell.
lcm_state() {
    _madrigal_vm "${1:-${VMID:-}}" LCM_STATE || return 1
    printf '%s\n' "$_madrigal_answer"
}

# disk_type: the TYPE of the disk $DST_PATH of the VM $VMID
disk_type() {
    local path=${DST_PATH:-}
    local id=${path##*.}
    if [[ ! $id =~ ^[0-9]+$ ]]; then
        log_error "'$path' is not a disk"
        return 1
    fi
    _madrigal_vm "${VMID:-}" "TEMPLATE/DISK[DISK_ID='$id']/TYPE" || return 1
    printf '%s\n' "$_madrigal_answer"
}

# is_undeployed VMID HOST: whether HOST is not the last one the VM was on.  Ends the driver if the front-end does not
# tell, which stock drivers take for a yes.
is_undeployed() {
    _madrigal_vm "${1:-${VMID:-}}" 'HISTORY_RECORDS/HISTORY[last()]/HOSTNAME' ||
        _madrigal_refuse 1 "Cannot find out from the front-end where VM ${1:-${VMID:-}} is"
    [ "$_madrigal_answer" != "${2:-}" ]
}
