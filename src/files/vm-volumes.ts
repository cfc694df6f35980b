/**
 * The logical volumes that only LVM itself can put together (thin, RAID, mirrors, snapshots, caches), as one image, one behind the
 * other: LVM and the device mapper of the kernel of a tiny virtual machine read them.
 *
 *     image → overlay (this process) → NBD → QEMU, one disk for each physical volume → LVM in the guest → this image
 *
 * No map of ours takes part, and nothing of this machine is touched. What cannot be read rejects; a guest that has ended or hangs
 * is an error of every read that waits or comes.
 */
import type { Clock } from '../clock.js';
import { B2Error } from '../errors.js';
import type { EventSink } from '../events.js';
import type { Image, ImageExtent } from '../image.js';
import { checkRange } from '../nbd/writable.js';
import { membersBelow, wholeFileSystem, type FoundArea } from './layout.js';
import type { LeftVolume } from './lvm.js';
import {
  openVmEnvironment,
  unreadableVolume,
  vmVolumesLack,
  VM_HINT,
  type StartedVolume,
  type VmEnvironment,
} from './vm.js';
import { GuestReadError, type BlockClient } from './vm-blocks.js';

export interface VmVolumesOptions {
  /** Taken over, also when opening rejects. */
  readonly image: Image;
  /** All of the image ({@link findAreas}). */
  readonly areas: readonly FoundArea[];
  readonly clock: Clock;
  readonly events: EventSink;
  readonly cacheDir: string;
  /** Ends the start. */
  readonly signal?: AbortSignal | undefined;
}

/** Until all volumes run: LVM reads its metadata through an emulated processor. */
const START_MS = 300_000;
/** Volumes begin at multiples of it. */
const ALIGNMENT = 1024 * 1024;

/** Volumes of LVM as an image: bytes between them are zeros. Reads reject as {@link Image.read}, and with `failed` where the guest has ended. */
export interface VmVolumes extends Image {
  /** File systems in volumes that are not among the areas of the image itself; their offsets are of this image. */
  readonly areas: readonly FoundArea[];
  /** Volumes that LVM could not start or nothing can be read of. */
  readonly left: readonly LeftVolume[];
  /** True when the guest has ended: nothing can be read any more. */
  readonly isGone: boolean;
  /** Ends the guest at once: everything that reads here gets `error`. */
  abandon(error: Error): void;
}

/**
 * Starts the guest and has LVM start all volumes. Kinds `unsupported` (something that is needed is not installed), `failed` (also
 * where it takes more than five minutes), `io`, `damaged`.
 */
export async function openVmVolumes(options: VmVolumesOptions): Promise<VmVolumes> {
  const { clock } = options;
  const image = new CountedImage(options.image);
  const lacks = await vmVolumesLack();
  if (lacks !== undefined) {
    await image.close();
    throw new B2Error('unsupported', `no tiny virtual machine can be started here: ${lacks}`, {
      hint: VM_HINT,
    });
  }
  const environment = await openVmEnvironment({
    ...options,
    image,
    areas: options.areas.filter((a) => a.holds === 'container'),
    purpose: 'blocks',
  });
  const done = new AbortController();
  const { signal } = options;
  const end = (): void =>
    environment.abandon(new B2Error('failed', 'the tiny virtual machine was ended'));
  if (signal?.aborted === true) end();
  signal?.addEventListener('abort', end, { once: true });
  const watch = clock.sleep(START_MS, done.signal).then(() => {
    if (done.signal.aborted) return;
    const text = `LVM in the tiny virtual machine has not started the volumes within ${START_MS / 60_000} minutes`;
    environment.abandon(new B2Error('failed', text));
  });
  try {
    const { volumes, left } = await environment.startVolumes();
    const blocks = await environment.serveBlocks(() => image.progress());
    const known = new Set(options.areas.map((a) => a.name));
    const volumesImage = new VolumesOfVm(
      environment,
      blocks,
      volumes.filter((v) => !known.has(v.name)),
      image.logicalBlockBytes,
    );
    await volumesImage.look(left, membersBelow(options.areas));
    return volumesImage;
  } catch (error) {
    await environment.close();
    throw error;
  } finally {
    signal?.removeEventListener('abort', end);
    done.abort();
    await watch;
  }
}

/** Tells whether something is being read of it. */
class CountedImage implements Image {
  readonly sizeBytes: number;
  readonly logicalBlockBytes: number;
  readonly #image: Image;
  #underWay = 0;
  #count = 0;

  constructor(image: Image) {
    this.#image = image;
    this.sizeBytes = image.sizeBytes;
    this.logicalBlockBytes = image.logicalBlockBytes;
  }

  /** Changes from call to call while a read goes on, and when one has ended. */
  progress(): number {
    if (this.#underWay > 0) this.#count++;
    return this.#count;
  }

  async read(into: Uint8Array, offset: number): Promise<void> {
    this.#underWay++;
    try {
      await this.#image.read(into, offset);
    } finally {
      this.#underWay--;
      this.#count++;
    }
  }

  extents(offset: number, length: number, limit?: number): Promise<readonly ImageExtent[]> {
    return this.#image.extents(offset, length, limit);
  }

  close(): Promise<void> {
    return this.#image.close();
  }
}

interface Placed extends StartedVolume {
  readonly offsetBytes: number;
}

class VolumesOfVm implements VmVolumes {
  readonly sizeBytes: number;
  readonly logicalBlockBytes: number;
  areas: readonly FoundArea[] = [];
  left: readonly LeftVolume[] = [];
  readonly #environment: VmEnvironment;
  readonly #blocks: BlockClient;
  readonly #placed: readonly Placed[];

  constructor(
    environment: VmEnvironment,
    blocks: BlockClient,
    volumes: readonly StartedVolume[],
    logicalBlockBytes: number,
  ) {
    this.#environment = environment;
    this.#blocks = blocks;
    this.logicalBlockBytes = logicalBlockBytes;
    let next = 0;
    this.#placed = volumes.map((volume) => {
      const offsetBytes = next;
      // A gap, so that what reads ahead of one volume meets nothing of the next.
      next += (Math.ceil(volume.sizeBytes / ALIGNMENT) + 1) * ALIGNMENT;
      return { ...volume, offsetBytes };
    });
    this.sizeBytes = Math.max(next, ALIGNMENT);
  }

  /** Finds out what is in the volumes. `below`: what they lie on. */
  async look(left: readonly LeftVolume[], below: Pick<FoundArea, 'members'>): Promise<void> {
    const areas: FoundArea[] = [];
    const unreadable: LeftVolume[] = [];
    for (const placed of this.#placed) {
      const { name, offsetBytes } = placed;
      try {
        const area = await wholeFileSystem(this.#volumeImage(placed), name);
        if (area === undefined) continue;
        const at = { offsetBytes: offsetBytes + area.offsetBytes, sizeBytes: area.sizeBytes };
        const members = [...(below.members ?? []), ...(area.members ?? [])];
        areas.push({
          ...area,
          name,
          ...at,
          ...(members.length === 0 ? {} : { members }),
          isInVm: true,
        });
      } catch (error) {
        if (!(error instanceof VolumeReadError)) throw error;
        unreadable.push({ place: '', volume: name, reason: unreadableVolume(name) });
      }
    }
    this.areas = areas;
    this.left = [...left, ...unreadable];
  }

  #volumeImage(placed: Placed): Image {
    return {
      sizeBytes: placed.sizeBytes,
      logicalBlockBytes: this.logicalBlockBytes,
      read: (into, offset) => this.#readVolume(placed, into, offset),
      extents: (offset, length) => Promise.resolve([{ offset, length, hole: false }]),
      close: () => Promise.resolve(),
    };
  }

  async #readVolume({ name, device }: Placed, into: Uint8Array, offset: number): Promise<void> {
    try {
      await this.#blocks.read(device, into, offset);
    } catch (error) {
      if (!(error instanceof GuestReadError)) throw error;
      // Why the guest cannot read it is mostly that the image could not be read for the guest.
      const below = this.#environment.failures.at(-1);
      if (below instanceof B2Error) throw below;
      throw new VolumeReadError(name, offset, error);
    }
  }

  async read(into: Uint8Array, offset: number): Promise<void> {
    checkRange(this.sizeBytes, offset, into.length);
    const end = offset + into.length;
    into.fill(0);
    const parts: Promise<void>[] = [];
    for (const placed of this.#placed) {
      const from = Math.max(offset, placed.offsetBytes);
      const to = Math.min(end, placed.offsetBytes + placed.sizeBytes);
      if (from >= to) continue;
      const part = into.subarray(from - offset, to - offset);
      parts.push(this.#readVolume(placed, part, from - placed.offsetBytes));
    }
    await Promise.all(parts);
  }

  extents(offset: number, length: number): Promise<readonly ImageExtent[]> {
    checkRange(this.sizeBytes, offset, length);
    return Promise.resolve(length === 0 ? [] : [{ offset, length, hole: false }]);
  }

  get isGone(): boolean {
    return this.#environment.isBroken;
  }

  abandon(error: Error): void {
    this.#environment.abandon(error);
  }

  close(): Promise<void> {
    return this.#environment.close();
  }
}

/** The device mapper of the guest refuses what the image has. */
export class VolumeReadError extends B2Error {
  constructor(volume: string, offset: number, cause: GuestReadError) {
    super(
      'io',
      `${volume}: the tiny virtual machine cannot read byte ${offset} of it (error ${cause.errno})`,
      { cause },
    );
  }
}
