/**
 * A trace instance of our own: buffers, filters and events that nobody else shares or changes
 * (Documentation/trace/ftrace.rst, "Instances"). It lies in /sys/kernel/tracing/instances and lives until it is removed, also
 * when its process has died: so its name says whose it is, and every start removes those of the dead.
 */
import { constants, openSync, closeSync } from 'node:fs';
import { mkdir, readdir, readFile, rmdir, writeFile } from 'node:fs/promises';
import path from 'node:path';

import { B2Error, errnoOf, ioError, messageOf } from '../../errors.js';
import {
  currentIdentity,
  machineFacts,
  type MachineFacts,
  type ProcessIdentity,
} from '../../process-identity.js';
import { readNow } from '../../syscalls.js';
import { runTool, type RunTool } from '../run.js';
import { blockEventLayout, parseEventFormat, parseHeaderPage, type PageLayout } from './format.js';
import { EventRole, PageParser } from './page.js';

export const TRACEFS = '/sys/kernel/tracing';

/** The events that are enabled. On blk-mq devices requests complete, on bio-based ones (zram, dm, md) bios do. */
const EVENTS: readonly { readonly name: string; readonly role: EventRole }[] = [
  { name: 'block_bio_queue', role: EventRole.issue },
  { name: 'block_rq_complete', role: EventRole.requestDone },
  { name: 'block_bio_complete', role: EventRole.bioDone },
];

const MAX_CPU_BUFFER_BYTES = 16 * 1024 * 1024;
const MIN_CPU_BUFFER_BYTES = 1024 * 1024;
/** Kernel memory for the buffers of all CPUs together, unless the least for each is more. */
const ALL_BUFFERS_BYTES = 128 * 1024 * 1024;

const MOUNT_TIMEOUT_MS = 10_000;

/**
 * What keeps this machine or process from tracing:
 * - `privilege`: not root, or the kernel is locked down;
 * - `tracefs`: no trace file system here;
 * - `events`: the kernel has no block events, or describes them in an unknown way;
 * - `machine`: big-endian, or a time namespace with a clock of its own.
 */
export type TraceObstacleReason = 'privilege' | 'tracefs' | 'events' | 'machine';

export interface TraceObstacle {
  readonly reason: TraceObstacleReason;
  /** In words, without a full stop. */
  readonly message: string;
}

/** What the tests replace. */
export interface TraceHost {
  readonly root: string;
  readonly identity: ProcessIdentity;
  readonly machine: MachineFacts;
  readonly run: RunTool;
}

export function traceHost(): TraceHost {
  return { root: TRACEFS, identity: currentIdentity(), machine: machineFacts(), run: runTool };
}

const NAME = /^b2-(\d+)-(\d*)-(\d*)-(\d+)$/;

function namespaceNumber(identity: { readonly namespaces: string }): string {
  return /pid:\[(\d+)\]/.exec(identity.namespaces)?.[1] ?? '';
}

let made = 0;

/** `b2-PID-START-PIDNAMESPACE-N`: enough to prove later that nobody needs it. */
function newName(identity: ProcessIdentity): string {
  return `b2-${identity.pid}-${identity.startTicks}-${namespaceNumber(identity)}-${++made}`;
}

/**
 * Removes instances of processes that are proven dead: of this pid namespace, and no such process of that start time. Returns
 * the names of those that this call removed. What cannot be removed is left, for whatever reason: the next start tries again,
 * and no watch fails because of another's leavings. Several may do this at once.
 */
export async function removeStaleInstances(
  host: TraceHost = traceHost(),
): Promise<readonly string[]> {
  const own = namespaceNumber(host.machine);
  if (own === '') return [];
  const removed: string[] = [];
  let names: string[];
  try {
    names = await readdir(path.join(host.root, 'instances'));
  } catch {
    return [];
  }
  for (const name of names) {
    const match = NAME.exec(name);
    if (match === null || match[3] !== own) continue;
    const found = host.machine.process(Number(match[1]));
    const isDead =
      found === 'gone' || (found !== 'unknown' && match[2] !== '' && found.startTicks !== match[2]);
    if (!isDead) continue;
    try {
      await rmdir(path.join(host.root, 'instances', name));
      removed.push(name);
    } catch {
      // EBUSY: somebody looks into it (trace-cmd, an administrator's shell). ENODEV: somebody else was removing it just now
      // (the kernel looks it up by name once more), ENOENT a moment later.
    }
  }
  return removed;
}

async function textOf(file: string): Promise<string | undefined> {
  try {
    return await readFile(file, 'utf8');
  } catch (error) {
    if (['ENOENT', 'ENOTDIR'].includes(errnoOf(error) ?? '')) return undefined;
    throw error;
  }
}

/** Mounts tracefs at its place if it is not there. Returns what is in the way, if something is. */
async function ensureTracefs(host: TraceHost): Promise<TraceObstacle | undefined> {
  const isThere = async (): Promise<boolean> =>
    (await textOf(path.join(host.root, 'trace_clock'))) !== undefined;
  try {
    if (await isThere()) return undefined;
    const done = await host.run('mount', ['-t', 'tracefs', 'tracefs', host.root], MOUNT_TIMEOUT_MS);
    if (await isThere()) return undefined;
    const why =
      done === undefined
        ? 'there is no mount program'
        : done.stderr.trim().replaceAll(/\s+/g, ' ').replace(/\.$/, '');
    return {
      reason: 'tracefs',
      message: `the kernel's trace file system is not at ${host.root} and cannot be mounted (${why === '' ? 'no reason given' : why})`,
    };
  } catch (error) {
    return denied(host, error);
  }
}

function denied(host: TraceHost, error: unknown): TraceObstacle {
  const errno = errnoOf(error);
  if (errno === 'EACCES' || errno === 'EPERM') {
    return {
      reason: 'privilege',
      message: `the kernel does not let this process use ${host.root}, though it runs as root: kernel lockdown (secure boot) or a container's limits`,
    };
  }
  return { reason: 'tracefs', message: `${host.root} cannot be used: ${messageOf(error)}` };
}

/** What keeps us from tracing, found without making an instance; undefined: nothing is known to. */
export async function traceObstacle(
  host: TraceHost = traceHost(),
  uid: number | undefined = process.geteuid?.(),
): Promise<TraceObstacle | undefined> {
  if (uid !== 0) return { reason: 'privilege', message: 'block events can be read by root only' };
  if (new Uint8Array(new Uint16Array([1]).buffer)[0] !== 1)
    return {
      reason: 'machine',
      message: 'b2 reads the trace buffers of little-endian machines only',
    };
  // In a time namespace with an offset our monotonic clock is not the one of the events.
  const offsets = await textOf('/proc/self/timens_offsets').catch(() => undefined);
  const monotonic = /^monotonic\s+(-?\d+)\s+(-?\d+)/m.exec(offsets ?? '');
  if (monotonic !== null && (Number(monotonic[1]) !== 0 || Number(monotonic[2]) !== 0)) {
    return {
      reason: 'machine',
      message: 'this process runs in a time namespace whose clock differs from that of the kernel',
    };
  }
  const mounting = await ensureTracefs(host);
  if (mounting !== undefined) return mounting;
  try {
    await readLayouts(host);
    await readdir(path.join(host.root, 'instances'));
  } catch (error) {
    if (error instanceof B2Error) return { reason: 'events', message: error.message };
    return denied(host, error);
  }
  return undefined;
}

interface Layouts {
  readonly page: PageLayout;
  readonly events: readonly {
    readonly role: EventRole;
    readonly layout: ReturnType<typeof blockEventLayout>;
  }[];
}

async function readLayouts(host: TraceHost): Promise<Layouts> {
  const headerFile = path.join(host.root, 'events/header_page');
  const need = async (file: string): Promise<string> => {
    const text = await textOf(file);
    if (text !== undefined) return text;
    throw new B2Error('unsupported', `this kernel has no block events: there is no ${file}`, {
      hint: 'They need a kernel with CONFIG_BLK_DEV_IO_TRACE or CONFIG_EVENT_TRACING.',
    });
  };
  const page = parseHeaderPage(await need(headerFile), headerFile);
  const events: Layouts['events'][number][] = [];
  for (const { name, role } of EVENTS) {
    const file = path.join(host.root, 'events/block', name, 'format');
    events.push({ role, layout: blockEventLayout(parseEventFormat(await need(file), file), file) });
  }
  return { page, events };
}

/** Sums of `per_cpu/cpuN/stats`. */
export interface BufferCounters {
  /** Overwritten before they were read. */
  readonly overrun: number;
  /** Not recorded at all. */
  readonly dropped: number;
}

/** Reads one `per_cpu/cpuN/stats`. */
export function parseCpuStats(text: string): BufferCounters {
  const of = (key: string): number =>
    Number(new RegExp(`^${key}:\\s*(\\d+)`, 'm').exec(text)?.[1] ?? 0);
  return { overrun: of('overrun'), dropped: of('commit overrun') + of('dropped events') };
}

/** One CPU's buffer, open for reading. */
export interface CpuBuffer {
  readonly fd: number;
  readonly statsFile: string;
}

export interface InstanceOptions {
  /** Kernel's number of the disk: major << 20 | minor. */
  readonly kernelDevice: number;
  /** Buffer of each CPU; default: 16 MiB, less on machines with many CPUs (128 MiB in all, but 1 MiB each). */
  readonly cpuBufferBytes?: number | undefined;
  readonly originNs: bigint;
}

/** An instance that is tracing. `remove` it. */
export class TraceInstance {
  readonly directory: string;
  readonly buffers: readonly CpuBuffer[];
  readonly parser: PageParser;
  /** Bytes of a page of the buffer: what one read gives. */
  readonly pageBytes: number;
  private removed = false;

  private constructor(
    directory: string,
    buffers: readonly CpuBuffer[],
    parser: PageParser,
    pageBytes: number,
  ) {
    this.directory = directory;
    this.buffers = buffers;
    this.parser = parser;
    this.pageBytes = pageBytes;
  }

  /** Makes an instance that records the changes of one disk and starts it. Kinds `unsupported`, `io`. */
  static async create(
    options: InstanceOptions,
    host: TraceHost = traceHost(),
  ): Promise<TraceInstance> {
    const layouts = await readLayouts(host);
    const directory = path.join(host.root, 'instances', newName(host.identity));
    const fds: number[] = [];
    const set = async (file: string, value: string): Promise<void> => {
      try {
        await writeFile(path.join(directory, file), value);
      } catch (error) {
        throw ioError(`set "${value}" in`, path.join(directory, file), error);
      }
    };
    try {
      await mkdir(directory);
    } catch (error) {
      throw ioError('make the trace instance', directory, error);
    }
    try {
      await set('tracing_on', '0');
      await set('trace_clock', 'mono');
      if (!/\[mono\]/.test(await readFile(path.join(directory, 'trace_clock'), 'utf8')))
        throw new B2Error(
          'unsupported',
          `the kernel does not take the monotonic clock for ${directory}`,
        );
      // Overwriting shows a loss in the pages themselves; the other way events would be dropped in silence.
      await set('options/overwrite', '1');
      const cpus = (await readdir(path.join(directory, 'per_cpu')))
        .filter((name) => /^cpu\d+$/.test(name))
        .toSorted((a, b) => Number(a.slice(3)) - Number(b.slice(3)));
      const each =
        options.cpuBufferBytes ??
        Math.max(
          MIN_CPU_BUFFER_BYTES,
          Math.min(MAX_CPU_BUFFER_BYTES, Math.floor(ALL_BUFFERS_BYTES / cpus.length)),
        );
      await set('buffer_size_kb', String(Math.ceil(each / 1024)));
      for (const { name } of EVENTS) {
        // Reads are most of the traffic of most disks: never recorded. Completions of bios are also let through when they
        // name no sector: that is how a driver shows that it cannot be watched.
        const sectors = name === 'block_bio_complete' ? '' : ' && nr_sector > 0';
        await set(
          `events/block/${name}/filter`,
          `dev == ${options.kernelDevice}${sectors} && !(rwbs ~ "R*")`,
        );
        await set(`events/block/${name}/enable`, '1');
      }
      const pageBytes = await pageBytesOf(directory, layouts.page.pageBytes);
      const buffers: CpuBuffer[] = [];
      for (const cpu of cpus) {
        const file = path.join(directory, 'per_cpu', cpu, 'trace_pipe_raw');
        try {
          const fd = openSync(file, constants.O_RDONLY | constants.O_NONBLOCK);
          fds.push(fd);
          buffers.push({ fd, statsFile: path.join(directory, 'per_cpu', cpu, 'stats') });
        } catch (error) {
          throw ioError('open', file, error);
        }
      }
      await set('tracing_on', '1');
      return new TraceInstance(
        directory,
        buffers,
        new PageParser(layouts.page, layouts.events, options.originNs),
        pageBytes,
      );
    } catch (error) {
      for (const fd of fds) closeSync(fd);
      await rmdir(directory).catch(() => undefined); // the reason it failed is worth more; the next start removes it
      throw error;
    }
  }

  /** Reads the next page of a buffer into `page` (`pageBytes` long); false if there is none. */
  readPage(buffer: CpuBuffer, page: Uint8Array): boolean {
    try {
      return readNow(buffer.fd, page) > 0;
    } catch (error) {
      throw ioError('read', path.join(this.directory, 'per_cpu'), error);
    }
  }

  /** Counters of lost events, since the instance began. */
  async counters(): Promise<BufferCounters> {
    let overrun = 0;
    let dropped = 0;
    for (const buffer of this.buffers) {
      try {
        const c = parseCpuStats(await readFile(buffer.statsFile, 'utf8'));
        overrun += c.overrun;
        dropped += c.dropped;
      } catch (error) {
        throw ioError('read', buffer.statsFile, error);
      }
    }
    return { overrun, dropped };
  }

  /** Stops tracing and removes the instance. Calling it again does nothing. */
  async remove(): Promise<void> {
    if (this.removed) return;
    this.removed = true;
    for (const { fd } of this.buffers) closeSync(fd);
    try {
      await rmdir(this.directory);
    } catch (error) {
      if (['ENOENT', 'ENODEV'].includes(errnoOf(error) ?? '')) return;
      throw ioError('remove the trace instance', this.directory, error);
    }
  }
}

/** The size of a sub-buffer (settable since Linux 6.8), else what `header_page` said. */
async function pageBytesOf(directory: string, fallback: number): Promise<number> {
  const text = await textOf(path.join(directory, 'buffer_subbuf_size_kb'));
  const kib = Number(text);
  return text !== undefined && Number.isInteger(kib) && kib > 0 ? kib * 1024 : fallback;
}
