#!/bin/sh
# Makes a freshly booted machine ready for forkd. Run by the agent before it listens.
#
# Its last act is to write /run/forkd/boot-outcome: "ready", or why the machine is not. The host reads
# it once the agent answers.
config=/run/forkd/config
outcome=/run/forkd/boot-outcome

say() {
    echo "forkd-machine: $*"
}

give_up() {
    say "$*"
    echo "$*" > "$outcome"
    exit 1
}

share_directories() {
    # cache=readahead keeps what is open and nothing longer, so a program that the host has rebuilt is
    # seen at its next start.
    while read -r tag path mode; do
        mkdir -p "$path"
        mount -t 9p -o "trans=virtio,version=9p2000.L,msize=512000,cache=readahead,$mode" "$tag" "$path" ||
            give_up "the shared directory $path cannot be mounted"
    done < "$config/shares"
}

configure_network() {
    ip addr flush dev eth0
    ip addr add 10.0.2.15/24 dev eth0 && ip link set eth0 up && ip route replace default via 10.0.2.2 ||
        give_up "the network interface eth0 cannot be configured"
    echo "nameserver 10.0.2.3" > /etc/resolv.conf
}

mount_data_disk() {
    mkdir -p /var/lib/forkd
    mount -t ext4 -o noatime,discard /dev/vdb /var/lib/forkd && return
    say "the data disk does not mount; checking it"
    e2fsck -p /dev/vdb
    # 0: clean, 1: repaired. Anything else needs a person.
    [ $? -le 1 ] || give_up "the data disk is damaged beyond automatic repair; e2fsck says so above"
    mount -t ext4 -o noatime,discard /dev/vdb /var/lib/forkd || give_up "the data disk does not mount"
}

tune_kernel() {
    # Monitors map their guests' memory privately: most of it is never written.
    echo 1 > /proc/sys/vm/overcommit_memory
    # A zygote maps every long run of every layer.
    echo 1048576 > /proc/sys/vm/max_map_count
    echo 1 > /proc/sys/net/ipv4/ip_forward
    # A stall that the kernel sees is a machine that the host should restart.
    echo 1 > /proc/sys/kernel/panic_on_rcu_stall
}

hold_kvm() {
    [ -c /dev/kvm ] || give_up "the machine has no /dev/kvm: its processor lacks SVM or VMX"
    [ -s "$config/keep-alive" ] || return 0
    set --
    while IFS= read -r word; do
        set -- "$@" "$word"
    done < "$config/keep-alive"
    setsid "$@" > /run/forkd/keep-alive.log 2>&1 < /dev/null &
    tries=0
    until grep -q "^keep-alive: holding" /run/forkd/keep-alive.log 2> /dev/null; do
        tries=$((tries + 1))
        kill -0 $! 2> /dev/null && [ $tries -lt 200 ] ||
            give_up "KVM cannot be kept alive ($*): $(cat /run/forkd/keep-alive.log)"
        sleep 0.05
    done
}

keep_controller_running() {
    [ -e "$config/controller" ] || return 0
    setsid /bin/sh -c '
        while :; do
            /forkd/bin/forkd-controller serve --bind 0.0.0.0:8889 --token-file /run/forkd/config/api-token \
                --state-dir /var/lib/forkd/state --socket /run/forkd/forkd.sock \
                --child-deadline 300
            echo "forkd-machine: forkd-controller ended with code $?; starting it again in a second"
            sleep 1
        done' >> /var/lib/forkd/controller.log 2>&1 < /dev/null &
}

install -m 0600 "$config/agent-token" /etc/forkd/machine-token || give_up "the agent's token cannot be written"
share_directories
configure_network
mount_data_disk
tune_kernel
hold_kvm
keep_controller_running
echo ready > "$outcome"
