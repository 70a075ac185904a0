# SPDX-License-Identifier: GPL-2.0-or-later
# Shared by the bash scripts beside it: paths, messages, checks, locks, progress.
# shellcheck shell=bash

set -euo pipefail

REPO=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck disable=SC2034 # for the scripts that read this
SCRIPTS=$REPO/scripts
FPH_CACHE=${FPH_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/free-page-hint}
JOBS=${JOBS:-$(nproc)}
case $FPH_CACHE in /*) ;; *) FPH_CACHE=$PWD/$FPH_CACHE ;; esac

# Debian's tools first: QEMU's configure and the linters must not meet another python3.
export PATH=/usr/lib/ccache:/usr/sbin:/usr/bin:/sbin:/bin:$PATH
export LC_ALL=C.UTF-8
# Relative paths and no directory in the hash let the stock and our build share objects.
export CCACHE_DIR=${CCACHE_DIR:-$FPH_CACHE/ccache} CCACHE_BASEDIR=$FPH_CACHE CCACHE_NOHASHDIR=1
# What the compiler tells of the headers that it read will do: without this, each miss preprocesses first.
export CCACHE_DEPEND=1
export CCACHE_MAXSIZE=5G

say() { echo "${0##*/}: $*"; }

die() {
    echo "${0##*/}: error: $*" >&2
    exit 1
}

# usage: prints the caller's opening comment (from the third line on) and leaves.
usage() {
    sed -n '3,/^$/s/^# \{0,1\}//p' "$0"
    exit "${1:-0}"
}

# takes PATTERN ARGUMENT...: leave with the usage unless the arguments match an extended regular expression.
takes() {
    local pattern=$1
    shift
    [[ ! $* =~ ^(-h|--help)$ ]] || usage
    [[ $* =~ ^($pattern)$ ]] || usage 1 >&2
}

# need_tools GROUP TOOL...: every TOOL must be there, else name the group that installs it.
need_tools() {
    local group=$1 tool
    shift
    for tool; do
        command -v "$tool" >/dev/null ||
            die "$tool is missing: run scripts/install-deps $group as root"
    done
}

# make_dir DIR: in the cache.
make_dir() { mkdir -p "$1" 2>/dev/null || die "cannot create $1: set FPH_CACHE to a directory you can write to"; }

# need_disk DIR MIB WHAT [ADVICE]: stop if the file system of DIR has less than MIB free.
need_disk() {
    local free advice=${4:-FPH_CACHE=dir puts the cache elsewhere}
    make_dir "$1"
    free=$(df -P -m "$1" | awk 'NR == 2 {print $4}')
    [ "$free" -ge "$2" ] ||
        die "$3 needs $2 MiB of disk in $1, only $free MiB are free ($advice)"
}

# need_memory MIB WHAT: stop if less than MIB of memory is available.
need_memory() {
    local free
    free=$(PYTHONPATH=$SCRIPTS /usr/bin/python3 -c \
        'from livemig import host; print(host.available_mib())')
    [ "$free" -ge "$1" ] ||
        die "$2 needs $1 MiB of memory, only $free MiB are available (JOBS=1 needs less)"
}

# lock FILE: one at a time; held until the script and the children that it started end.
lock() {
    make_dir "$(dirname "$1")"
    exec 9>"$1"
    flock -n 9 || {
        say "waiting for another run that holds $1"
        flock 9
    }
}

# content_hash PATH...: one hash over names and contents of files (relative to the repo).
content_hash() {
    (cd "$REPO" && find "$@" -type f -print0 | LC_ALL=C sort -z | xargs -0r sha256sum) |
        sha256sum | cut -c1-32
}

# quietly LOG WHAT COMMAND...: run COMMAND into LOG; if it fails, say that WHAT did, and the line that says most
# likely why.
quietly() {
    local log=$1 what=$2
    shift 2
    "$@" >"$log" 2>&1 || die "$what failed: $(grep -m 1 -i '^E: \|error' "$log" || tail -n 1 "$log"). Log: $log"
}

# skip_if_made STAMP KEY WHAT: leave if the file STAMP says that WHAT was made of what KEY says.
skip_if_made() {
    [ "$(cat "$1" 2>/dev/null)" = "$2" ] || return 0
    say "up to date: $3"
    exit
}

# work_dir PREFIX: set $work to a new directory, which goes when the script ends, and take away what a killed
# run left. Never through a mount that a chroot in it may have left.
work_dir() {
    rm -rf --one-file-system "$1".work.*
    work=$(mktemp -d "$1.work.XXXXXX")
    trap 'rm -rf --one-file-system "$work"' EXIT
}

# cpio_of DIR: an archive for a kernel to unpack, on standard output. Sorted, owned by root, without times: the
# same input makes the same archive.
cpio_of() {
    find "$1" -exec touch -h -d @0 {} + &&
        (cd "$1" && find . -print0 | LC_ALL=C sort -z |
            cpio --null --create --quiet --format=newc --reproducible --owner=+0:+0) | gzip -9n
}

# mirror_of SUITE Packages|Sources: where apt gets them from; fails if it is not configured to.
mirror_of() {
    # shellcheck disable=SC2016 # apt expands these
    apt-get indextargets --no-release-info --format '$(RELEASE) $(COMPONENT) $(CREATED_BY) $(REPO_URI)' |
        sed -n "s/^$1 main $2 //p" | grep -m 1 .
}

# show_progress NAME: pass ninja's [n/m], or else a count of make's and apt's steps, to the console:
# one line that changes on a terminal, a line now and then elsewhere.
show_progress() {
    local line steps=0 last=0 mark text live=0
    [ ! -t 1 ] || live=1
    while read -r line; do
        if [[ $line =~ ^\[([0-9]+)/([0-9]+)\] ]]; then
            text="${BASH_REMATCH[1]} of ${BASH_REMATCH[2]}"
            mark=$((BASH_REMATCH[1] * 10 / BASH_REMATCH[2]))
        elif [[ $line =~ ^([A-Z]+\ \ |Unpacking |Setting\ up ) ]]; then
            steps=$((steps + 1))
            text="$steps steps"
            mark=$((steps / 200))
        else
            continue
        fi
        if [ $live = 1 ]; then
            printf '\r%s: %s\033[K' "$1" "$text"
        elif [ "$mark" != "$last" ]; then
            echo "$1: $text"
        fi
        last=$mark
    done
    [ $live = 0 ] || printf '\r\033[K'
}

# logged LOG NAME COMMAND...: run a long step into LOG, with progress on the console; on failure
# show the end of the log.
logged() {
    local log=$1 name=$2 start=$SECONDS
    shift 2
    touch "$log.running"
    if ! "$@" 2>&1 | tee -a "$log" | show_progress "$name"; then
        rm -f "$log.running"
        echo "--- the last lines of $log:" >&2
        tail -n 20 "$log" >&2
        die "$name failed after $((SECONDS - start)) s; the whole log is $log"
    fi
    rm -f "$log.running"
}
