/**
 * Devices that carry one file system, volume group or array share their points without being told to: points of their own would be of
 * different instants, and what lies on all of them could not be had out of any.
 */
import { openReadDevice } from '../../devices/open.js';
import { carriedBy, type Carried } from '../../files/carried.js';
import type { Clock } from '../../clock.js';
import type { Image } from '../../image.js';
import { keyOf, type Target } from './watch-targets.js';

/** Reads what a device carries; rejects where it cannot be read. */
export type ReadCarried = (device: string) => Promise<readonly Carried[]>;

/** {@link carriedBy} of a device, as it is on the medium now. */
export async function carriedOn(device: string): Promise<readonly Carried[]> {
  const opened = await openReadDevice(device);
  const { sizeBytes, logicalBlockBytes } = opened.facts;
  const image: Image = {
    sizeBytes,
    logicalBlockBytes,
    read: async (into, offset) => {
      const got = await opened.read(into, offset);
      into.fill(0, got);
    },
    extents: (offset, length) => Promise.resolve([{ offset, length, hole: false }]),
    close: () => Promise.resolve(),
  };
  try {
    return await carriedBy(image, device);
  } finally {
    await opened.close();
  }
}

/** What is said about devices that belong together. */
export type SaySharing = (priority: 'notice' | 'warning', message: string, hint?: string) => void;

export interface SharedDevicesOptions {
  readonly clock: Clock;
  /** What is not read by then is not waited for. */
  readonly signal: AbortSignal;
  readonly say: SaySharing;
  readonly read?: ReadCarried;
}

/** A disk that does not answer holds up the capture of the others for so long, and no longer. */
const READ_MS = 5_000;

/** Keeps in mind what devices carry: one that is away when the configuration is loaded again stays in its group. */
export class SharedDevices {
  readonly #options: Required<SharedDevicesOptions>;
  readonly #known = new Map<string, readonly Carried[]>();
  /** Each takes one of the few threads that read, until the device answers: one a device, however often it is asked for. */
  readonly #reading = new Map<string, Promise<void>>();

  constructor(options: SharedDevicesOptions) {
    this.#options = { read: carriedOn, ...options };
  }

  /**
   * The targets, with a group for those that carry something in common and of which none has a group by the options or the configuration. Groups
   * that were given are left as they are; where they part what belongs together, that is said. Devices of which two carry the very same are
   * left alone, too: they are no more of one instant for it, and whatever takes all of a group would meet the copy.
   */
  async group(targets: readonly Target[]): Promise<readonly Target[]> {
    if (targets.length < 2) return targets;
    const { say } = this.#options;
    const carried = await Promise.all(targets.map((t) => this.#carriedOf(t.device)));
    const names = new Set(targets.flatMap((t) => (t.group === undefined ? [] : [t.group.name])));
    const result = [...targets];
    for (const indexes of together(carried)) {
      const members = indexes.flatMap((i) => targets[i] ?? []);
      const devices = members.map((t) => t.device);
      const common = commonOf(indexes.map((i) => carried[i] ?? []));
      const what = common.map((c) => c.what).join(', ');
      const isGiven = new Set(members.map((t) => t.group?.name ?? '')).size === 1;
      const twins = twinsIn(members.map((t, i) => [t.device, carried[indexes[i] ?? -1] ?? []]));
      if (twins !== undefined && !(isGiven && members[0]?.group !== undefined)) {
        say(
          'warning',
          `${what}: on ${devices.join(', ')}, of which ${twins.join(' and ')} are one disk in two ways or copies of each other: no group is made of them`,
          'Watch one of the two; or give those that belong together a "group" in the configuration file, or --group.',
        );
      } else if (members.every((t) => t.group === undefined)) {
        const name = unusedName(common[0]?.name ?? '', names);
        names.add(name);
        const group = { name, devices };
        for (const i of indexes) {
          const target = targets[i];
          if (target !== undefined) result[i] = { ...target, group, key: keyOf(target, group) };
        }
        say(
          'notice',
          `${what}: on ${devices.join(', ')}, which share their points (group ${name})`,
        );
      } else if (new Set(members.map((t) => t.group?.name)).size > 1) {
        say(
          'warning',
          `${what}: on ${devices.join(', ')}, which are not of one group: no point is one instant of all of them`,
          'Give them the same "group" in the configuration file, or --group.',
        );
      }
    }
    return result;
  }

  async #carriedOf(device: string): Promise<readonly Carried[]> {
    const { clock, signal, say } = this.#options;
    const over = new AbortController();
    const late = clock.sleep(READ_MS, AbortSignal.any([signal, over.signal])).then(() => 'late');
    const first = await Promise.race([this.#read(device), late]);
    over.abort();
    if (first === 'late' && !signal.aborted && !this.#known.has(device))
      say(
        'warning',
        `${device} did not answer within ${READ_MS / 1000} s: whether it shares a file system or volume group with the others is not known`,
        'Once it answers, SIGHUP (systemctl reload) lets b2 look again; or give the devices the same "group".',
      );
    return this.#known.get(device) ?? [];
  }

  #read(device: string): Promise<void> {
    let reading = this.#reading.get(device);
    if (reading !== undefined) return reading;
    reading = this.#options
      .read(device)
      .then(
        (carried) => {
          this.#known.set(device, carried);
        },
        // It may be away, or not be readable: its session says so.
        () => undefined,
      )
      .finally(() => this.#reading.delete(device));
    this.#reading.set(device, reading);
    return reading;
  }
}

/** Sets of two and more that hang together by what they carry; the indexes of each ascend. */
function together(carried: readonly (readonly Carried[])[]): readonly (readonly number[])[] {
  let sets: { readonly keys: Set<string>; readonly indexes: number[] }[] = [];
  for (const [i, list] of carried.entries()) {
    const keys = new Set(list.map((c) => c.key));
    const joined = sets.filter((s) => [...s.keys].some((key) => keys.has(key)));
    const merged = {
      keys: new Set([...joined.flatMap((s) => [...s.keys]), ...keys]),
      indexes: [...joined.flatMap((s) => s.indexes), i],
    };
    sets = [...sets.filter((s) => !joined.includes(s)), merged];
  }
  return sets.map((s) => s.indexes.toSorted((a, b) => a - b)).filter((s) => s.length > 1);
}

/** What two or more of them carry, each once. */
function commonOf(lists: readonly (readonly Carried[])[]): readonly Carried[] {
  const counts = new Map<string, number>();
  for (const { key } of lists.flat()) counts.set(key, (counts.get(key) ?? 0) + 1);
  const all = [...new Map(lists.flat().map((c) => [c.key, c])).values()];
  return all.filter((c) => (counts.get(c.key) ?? 0) > 1);
}

/** Two devices with the very same part of something: a disk and a partition of it, two paths to one disk, a copy. */
function twinsIn(
  carried: readonly (readonly [device: string, carried: readonly Carried[]])[],
): readonly [string, string] | undefined {
  const seen = new Map<
    string,
    { readonly device: string; readonly within: string | undefined }[]
  >();
  for (const [device, list] of carried)
    for (const { key, parts } of list)
      for (const { id, within } of parts) {
        const others = seen.get(`${key} ${id}`) ?? [];
        // The members of one array have the same, each its own copy of it.
        const twin = others.find(
          (o) => o.device !== device && (within === undefined || within !== o.within),
        );
        if (twin !== undefined) return [twin.device, device];
        seen.set(`${key} ${id}`, [...others, { device, within }]);
      }
  return undefined;
}

function unusedName(wanted: string, used: ReadonlySet<string>): string {
  let name = wanted;
  for (let n = 2; used.has(name); n++) name = `${wanted}-${n}`;
  return name;
}
