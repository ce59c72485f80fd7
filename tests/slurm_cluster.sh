#!/usr/bin/env bash
# Start or stop a Slurm cluster of two nodes on this machine, for tests: slurm_cluster.sh start|stop
# Requires root, and Debian's packages slurm-wlm and munge. Each node has one CPU.
set -euo pipefail
folder=${SLURM_CLUSTER:-/tmp/alexnet_repro-slurm}

start() {
    mkdir -p "$folder"/{state,n1,n2,log} /run/munge
    chown munge: /run/munge
    if [ ! -s /etc/munge/munge.key ]; then
        head -c 1024 /dev/urandom >/etc/munge/munge.key
        chown munge: /etc/munge/munge.key
        chmod 400 /etc/munge/munge.key
    fi
    pgrep -x munged >/dev/null || runuser -u munge -- /usr/sbin/munged --force
    grep -qw n1 /etc/hosts || echo '127.0.0.1 n1 n2' >>/etc/hosts # processes meet at the name of the first node
    local host
    host=$(hostname -s)
    cat >/etc/slurm/slurm.conf <<EOF
ClusterName=alexnet
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/%n.pid
SlurmctldLogFile=$folder/log/slurmctld
SlurmdLogFile=$folder/log/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
JobRequeue=1
KillWait=20
NodeName=n[1-2] NodeHostname=$host NodeAddr=127.0.0.1 Port=[17001-17002] CPUs=1 RealMemory=4000 State=UNKNOWN
PartitionName=cpu Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
EOF
    slurmctld -c
    sleep 2
    slurmd -N n1
    slurmd -N n2
    for _ in $(seq 30); do
        [ "$(sinfo -h -N -t idle -o %N | wc -l)" = 2 ] && return
        sleep 1
    done
    echo "the nodes did not become idle: see $folder/log" >&2
    return 1
}

stop() {
    for pid in "$folder"/{n1,n2,slurmctld}.pid; do
        if [ -f "$pid" ]; then kill "$(cat "$pid")" || true; fi
    done
}

"${1:?start or stop}"
