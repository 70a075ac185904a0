# SPDX-License-Identifier: GPL-2.0-or-later
# Shared by the bash scripts beside it: paths, messages, checks, locks, build progress.
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

# need_tools GROUP TOOL...: every TOOL must be there, else name the group that installs it.
need_tools() {
    local group=$1 tool
    shift
    for tool; do
        command -v "$tool" >/dev/null ||
            die "$tool is missing: run scripts/install-deps $group as root"
    done
}

# need_disk DIR MIB WHAT [ADVICE]: stop if the file system of DIR has less than MIB free.
need_disk() {
    local free advice=${4:-FPH_CACHE=dir puts the cache elsewhere}
    mkdir -p "$1" 2>/dev/null || die "cannot create $1: set FPH_CACHE to a directory you can write to"
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
    mkdir -p "$(dirname "$1")"
    exec 9>"$1"
    flock -n 9 || {
        say "waiting for another run that holds $1"
        flock 9
    }
}

# What is meant if no series of versions is named.
declare -A DEFAULT_SERIES=([qemu]=10.0 [linux]=6.12 [kernel]=6.12 [libvirt]=11.3)

# with_series NAME qemu|linux|kernel|libvirt SERIES: NAME-SERIES, or just NAME for the default series, or if
# SERIES is empty.
with_series() {
    case $3 in
    '' | "${DEFAULT_SERIES[$2]}") echo "$1" ;;
    *) echo "$1-$3" ;;
    esac
}

# split_series qemu|linux|kernel|libvirt[=SERIES]: set $name and $series (empty: the default one); fails if it
# is none of these.
split_series() {
    [[ $1 =~ ^(qemu|linux|kernel|libvirt)(=([0-9]+\.[0-9]+))?$ ]] || return 1
    # shellcheck disable=SC2034 # for the caller
    name=${BASH_REMATCH[1]} series=${BASH_REMATCH[3]}
}

# split_variant qemu|kernel|libvirt VARIANT[-SERIES] VARIANTS: set $variant, $series (empty: the default one)
# and $build, the name of the build; fails if it is none of VARIANTS (a pattern).
split_variant() {
    [[ $2 =~ ^($3)(-([0-9]+\.[0-9]+))?$ ]] || return 1
    # shellcheck disable=SC2034 # for the caller
    variant=${BASH_REMATCH[1]} series=${BASH_REMATCH[3]}
    # shellcheck disable=SC2034
    build=$(with_series "$variant" "$1" "$series")
}

# source_dir qemu|linux|libvirt [SERIES]: the pristine tree that fetch left in the cache.
source_dir() {
    local dir
    dir=$(readlink -e "$FPH_CACHE/src/$(with_series "$1" "$1" "${2:-}")") ||
        die "no $1${2:+ $2} source in $FPH_CACHE/src: run scripts/fetch $1${2:+=$2}"
    echo "$dir"
}

# tree_version qemu|kernel|libvirt TREE: upstream's version of a source tree, such as 10.0.13.
tree_version() {
    local version=
    case $1 in
    qemu) [ ! -d "$2/qapi" ] || version=$(cat "$2/VERSION") ;;
    kernel)
        [ ! -d "$2/kernel/sched" ] || version=$(awk -F' *= *' '
            /^(VERSION|PATCHLEVEL|SUBLEVEL) =/ {v = v sep $2; sep = "."}
            END {print v}' "$2/Makefile")
        ;;
    libvirt) [ ! -d "$2/src/qemu" ] || version=$(sed -n "s/^  version: '\(.*\)',/\1/p" "$2/meson.build") ;;
    esac
    [[ $version =~ ^[0-9]+\.[0-9]+ ]] || die "$2 is not a $1 source tree"
    echo "$version"
}

# patches_dir qemu|kernel|libvirt TREE: our hooks for the tree's version.
patches_dir() {
    local version major have
    version=$(tree_version "$1" "$2")
    major=$(cut -d. -f1,2 <<<"$version")
    have=$(cd "$REPO/$1/patches" && echo *)
    [ -d "$REPO/$1/patches/$major" ] ||
        die "$2 is $1 $version; there are hooks for $1 $have only (in $1/patches)"
    echo "$REPO/$1/patches/$major"
}

# series_patches DIR: the patches of a series file, in order.
series_patches() { sed 's/#.*//; s/[[:space:]]*$//; /^$/d' "$1/series"; }

# series_base DIR: the source version that a series was made for (its "# base:" line).
series_base() {
    local base
    base=$(sed -n 's/^# base: *//p' "$1/series")
    echo "${base:-unknown}"
}

# portable_header FROM TO: a uapi header for QEMU. The same substitutions as headers_install in
# Linux and cp_portable in QEMU's scripts/update-linux-headers.sh, as far as ours needs them.
portable_header() {
    sed -e 's/_UAPI_LINUX/_LINUX/' \
        -e 's/__u\([0-9][0-9]*\)/uint\1_t/g' \
        -e 's/__le\([0-9][0-9]*\)/uint\1_t/g' \
        -e 's/<linux\/\([^>]*\)>/"standard-headers\/linux\/\1"/' "$1" >"$2"
}

# new_files qemu|kernel|libvirt DIR: put the overlay's new files into DIR, at their upstream paths.
new_files() {
    local header file
    header=linux/virtio_balloon_hint.h
    (cd "$REPO/$1" && find . -path ./patches -prune -o -type f -print) | sed 's/^..//' |
        while read -r file; do
            mkdir -p "$2/$(dirname "$file")"
            cp "$REPO/$1/$file" "$2/$file"
        done
    if [ "$1" = qemu ] && [ -e "$REPO/kernel/include/uapi/$header" ]; then
        mkdir -p "$2/include/standard-headers/linux"
        portable_header "$REPO/kernel/include/uapi/$header" "$2/include/standard-headers/$header"
    fi
}

# content_hash PATH...: one hash over names and contents of files (relative to the repo).
content_hash() {
    (cd "$REPO" && find "$@" -type f -print0 | LC_ALL=C sort -z | xargs -0r sha256sum) |
        sha256sum | cut -c1-32
}

# overlay_hash qemu|kernel|libvirt TREE PATH...: the hash of an overlay, as it is for the version of TREE, and
# of other files. What is changed for one version leaves the builds of others alone.
overlay_hash() {
    local patches
    patches=$(patches_dir "$1" "$2")
    content_hash "$1" "${@:3}" \( -not -path "$1/patches/*" -o -path "${patches#"$REPO"/}/*" \)
}

# mirror_of SUITE Packages|Sources: where apt gets them from; fails if it is not configured to.
mirror_of() {
    # shellcheck disable=SC2016 # apt expands these
    apt-get indextargets --no-release-info --format '$(RELEASE) $(COMPONENT) $(CREATED_BY) $(REPO_URI)' |
        sed -n "s/^$1 main $2 //p" | grep -m 1 .
}

# apt_entry "deb|deb-src ..." MIRROR "SUITE ...": a stanza for apt's lists of sources.
apt_entry() {
    printf 'Types: %s\nURIs: %s\nSuites: %s\nComponents: main\nSigned-By: %s\n\n' \
        "$1" "$2" "$3" /usr/share/keyrings/debian-archive-keyring.gpg
}

# start_build DIR: make DIR/build and an empty DIR/build.log. What a killed run left half-written is
# newer than the mark that logged() made and never removed: drop it.
start_build() {
    mkdir -p "$1/build"
    if [ -e "$1/build.log.running" ]; then
        say "the last build was killed: dropping the objects that it wrote"
        find "$1/build" -type f -newer "$1/build.log.running" -name '*.[oa]' -delete
    fi
    : >"$1/build.log"
}

# copy_source PRISTINE DIR VARIANT MIB: make DIR/src PRISTINE, without another version's remains, with
# MIB of disk for the build. Ours is a copy, for the overlay; stock shares its files with PRISTINE.
copy_source() {
    local how=(-a --reflink=auto) need=$4
    if [ "$(cat "$2/src.version" 2>/dev/null)" = "$(basename "$1")" ]; then
        need_disk "$2" "$need" "building $(basename "$1")"
        return
    fi
    rm -rf "$2/src" "$2/src.version" "$2/build"
    if [ "$3" = stock ]; then
        how=(-al)
    else
        need=$((need + $(du -sm "$1" | cut -f1)))
    fi
    need_disk "$2" "$need" "building $(basename "$1")"
    say "copying $(basename "$1")"
    mkdir "$2/build"
    cp "${how[@]}" "$1" "$2/src"
    basename "$1" >"$2/src.version"
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
