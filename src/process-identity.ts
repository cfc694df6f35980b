/**
 * Who a process is, well enough to say later, on the same machine, that it cannot be running any more.
 * Used by leases and for the names of temporary files.
 *
 * A process id alone proves nothing: ids are used again, differ between pid namespaces, and mean nothing on
 * another machine. So an identity also carries the boot, the namespaces and the start time of the process.
 */
import { createHash } from 'node:crypto';
import { readFileSync, readlinkSync } from 'node:fs';
import { hostname } from 'node:os';
import { errnoOf } from './errors.js';

export interface ProcessIdentity {
  /** Host name, for people. */
  readonly host: string;
  /** A digest of /etc/machine-id; '' where there is none (many containers). */
  readonly machineId: string;
  /** /proc/sys/kernel/random/boot_id: another one after every boot; '' where it cannot be read. */
  readonly bootId: string;
  readonly pid: number;
  /** Start of the process in clock ticks after boot (field 22 of /proc/PID/stat); '' if unknown. */
  readonly startTicks: string;
  /** The pid and time namespaces in which `pid` and `startTicks` mean something; '' if unknown. */
  readonly namespaces: string;
}

/** What a machine says about itself and its processes; replaced in tests. */
export interface MachineFacts {
  readonly host: string;
  readonly machineId: string;
  readonly bootId: string;
  readonly namespaces: string;
  /**
   * The state of a process of this machine and these namespaces. `gone`: certainly not running.
   * `unknown`: it may be there, but its start time cannot be read.
   */
  process(pid: number): { readonly startTicks: string } | 'gone' | 'unknown';
}

function readTrimmed(path: string): string {
  try {
    return readFileSync(path, 'utf8').trim();
  } catch {
    return '';
  }
}

/**
 * The namespaces of this process; '' if /proc is missing or shows another pid namespace than ours, because then
 * nothing can be said about a process id.
 */
function ownNamespaces(): string {
  try {
    if (readlinkSync('/proc/self') !== String(process.pid)) return '';
    const pid = readlinkSync('/proc/self/ns/pid');
    let time = '';
    try {
      time = readlinkSync('/proc/self/ns/time');
    } catch {
      // Kernels before 5.6 have no time namespaces.
    }
    return `${pid} ${time}`.trim();
  } catch {
    return '';
  }
}

/** State, thread count and start time from /proc/PID/stat; undefined if it cannot be read. */
function readStat(pid: number): { state: string; threads: number; startTicks: string } | undefined {
  const text = readTrimmed(`/proc/${pid}/stat`);
  // The second field is the command in parentheses, and may itself contain spaces and parentheses.
  const fields = text.slice(text.lastIndexOf(')') + 2).split(' ');
  const [state, threads, startTicks] = [fields[0], fields[17], fields[19]];
  if (state === undefined || threads === undefined || startTicks === undefined) return undefined;
  return { state, threads: Number(threads), startTicks };
}

function processOf(pid: number): { startTicks: string } | 'gone' | 'unknown' {
  try {
    process.kill(pid, 0);
  } catch (error) {
    if (errnoOf(error) === 'ESRCH') return 'gone';
    // EPERM: it runs as another user.
  }
  const stat = readStat(pid);
  // It may have ended since the signal, or be hidden from us (mount option hidepid).
  if (stat === undefined) return 'unknown';
  // A dead process that nobody has waited for. With more than one thread others may still be finishing a write.
  if ((stat.state === 'Z' || stat.state === 'X') && stat.threads <= 1) return 'gone';
  return { startTicks: stat.startTicks };
}

let facts: MachineFacts | undefined;

/** The facts of this machine, read once. */
export function machineFacts(): MachineFacts {
  if (facts === undefined) {
    const machineId = readTrimmed('/etc/machine-id');
    facts = {
      host: hostname(),
      // machine-id(5) asks that the id itself is not handed to others.
      machineId:
        machineId === ''
          ? ''
          : createHash('sha256').update(`b2 machine ${machineId}`).digest('hex').slice(0, 32),
      bootId: readTrimmed('/proc/sys/kernel/random/boot_id'),
      namespaces: ownNamespaces(),
      process: processOf,
    };
  }
  return facts;
}

let own: ProcessIdentity | undefined;

/** The identity of this process (all its threads share it). */
export function currentIdentity(): ProcessIdentity {
  if (own === undefined) {
    const { host, machineId, bootId, namespaces } = machineFacts();
    const startTicks = namespaces === '' ? '' : (readStat(process.pid)?.startTicks ?? '');
    own = { host, machineId, bootId, pid: process.pid, startTicks, namespaces };
  }
  return own;
}

/** True if both come from one boot of one kernel and one set of namespaces, so that process ids compare. */
export function sameProcessTable(
  identity: ProcessIdentity,
  machine: MachineFacts = machineFacts(),
): boolean {
  return (
    identity.bootId !== '' &&
    identity.bootId === machine.bootId &&
    identity.namespaces !== '' &&
    identity.namespaces === machine.namespaces
  );
}

/**
 * True only if that process certainly does not run any more: it belongs to this boot and these namespaces and
 * there is no such process (or one of another start time), or it belongs to an earlier boot of this machine.
 * False means "not known": it may run on another machine, in another container, or here.
 */
export function isProvablyDead(
  identity: ProcessIdentity,
  machine: MachineFacts = machineFacts(),
): boolean {
  if (sameProcessTable(identity, machine)) {
    const found = machine.process(identity.pid);
    if (found === 'gone') return true;
    if (found === 'unknown' || identity.startTicks === '') return false;
    return found.startTicks !== identity.startTicks;
  }
  // Machines cloned from one image may share a machine id; they hardly share the host name too.
  return (
    identity.machineId !== '' &&
    identity.machineId === machine.machineId &&
    identity.host === machine.host &&
    identity.bootId !== '' &&
    machine.bootId !== '' &&
    identity.bootId !== machine.bootId
  );
}

/** True only if that process certainly runs now, on this machine, as seen from here. */
export function isProvablyAlive(
  identity: ProcessIdentity,
  machine: MachineFacts = machineFacts(),
): boolean {
  if (!sameProcessTable(identity, machine) || identity.startTicks === '') return false;
  const found = machine.process(identity.pid);
  return typeof found === 'object' && found.startTicks === identity.startTicks;
}
