/** The thread of {@link DecodePool}: reads frames of one chunk, opens and checks them, and leaves the chunks in shared memory. */
import type { MessagePort } from 'node:worker_threads';

import { FRAME_HEADER_BYTES } from '../format/frame.js';
import { packName } from '../format/names.js';
import type { FooterFrame } from '../format/pack.js';
import { adoptAligned } from '../memory.js';
import { serveWorker } from '../workers.js';
import { DecodeQueue } from './decode-queue.js';
import { contextOf, loadNative, type RepositoryHandle } from './handle.js';
import type { PackReadContext } from './pack-reader.js';
import { ChunkRoom, SingleChunks } from './single-chunks.js';
import type { ObjectReader } from './store.js';
import { openStore } from './store-url.js';

export interface DecodeStart {
  readonly handle: RepositoryHandle;
  readonly slab: SharedArrayBuffer;
  readonly slotBytes: number;
  /** Memory of the {@link DecodeQueue}, for as many slots as the slab has. */
  readonly queue: SharedArrayBuffer;
  /** For calling who sleeps, in both directions; the thread closes it when it is stopped. */
  readonly port: MessagePort;
}

/** There is something in the queue. */
export type ToDecoder = 'work';

/** The thread has begun; there is an answer. */
export type FromDecoder = 'ready' | 'answer';

/** Packs that a thread keeps open. */
const OPEN_PACKS = 16;
/** Frames that lie this far apart at most are read at once. */
const GAP_BYTES = 64 * 1024;

interface DecoderPack {
  readonly reader: ObjectReader;
  readonly single: SingleChunks;
}

/** What the thread does, without the thread. One call at a time. */
export class FrameReader {
  private readonly ctx: PackReadContext;
  private readonly slots: readonly Buffer[];
  private readonly packs = new Map<string, DecoderPack>();
  private readonly room = new ChunkRoom();
  private buffer: Buffer = Buffer.alloc(0);

  constructor(ctx: PackReadContext, slab: ArrayBufferLike, slotBytes: number) {
    this.ctx = ctx;
    const count = Math.floor(slab.byteLength / slotBytes);
    this.slots = Array.from({ length: count }, (_, i) =>
      Buffer.from(slab, i * slotBytes, slotBytes),
    );
  }

  /**
   * Puts the chunks of `frames` into `slots`; says for each whether it is there, whole and verified. What is wrong with the others,
   * who asked finds out in the ordinary way. Never rejects.
   */
  async decode(
    packId: string,
    frames: readonly FooterFrame[],
    slots: readonly number[],
  ): Promise<boolean[]> {
    const good = frames.map(() => false);
    try {
      const { reader, single } = await this.open(packId);
      for (let from = 0; from < frames.length;) {
        const first = frames[from];
        if (first === undefined) break;
        let end = endOf(first);
        let to = from + 1;
        for (let next = frames[to]; next !== undefined; next = frames[++to]) {
          if (next.offset < end || next.offset - end > GAP_BYTES) break;
          end = endOf(next);
        }
        const bytes = this.bufferOf(end - first.offset);
        const got = await readStepwise(reader, bytes, first.offset);
        for (; from < to; from++) {
          const frame = frames[from];
          const slot = this.slots[slots[from] ?? -1];
          if (frame === undefined || slot === undefined || frame.plainBytes > slot.length) continue;
          const at = frame.offset - first.offset;
          if (at + FRAME_HEADER_BYTES + frame.storedBytes > got) continue;
          good[from] = single.open(frame, bytes, at, slot.subarray(0, frame.plainBytes));
        }
      }
    } catch {
      // Nothing that was not said to be good is used.
    }
    // The object may be another one by now: compaction puts a new one in its place.
    if (good.includes(false)) await this.forget(packId);
    return good;
  }

  async close(): Promise<void> {
    for (const packId of this.packs.keys()) await this.forget(packId);
  }

  private async open(packId: string): Promise<DecoderPack> {
    let pack = this.packs.get(packId);
    if (pack === undefined) {
      for (const oldest of this.packs.keys()) {
        if (this.packs.size < OPEN_PACKS) break;
        await this.forget(oldest);
      }
      pack = {
        reader: await this.ctx.store.open(packName(packId)),
        single: new SingleChunks(this.ctx, packId, this.ctx.keys.packSealer(packId), this.room),
      };
    } else {
      this.packs.delete(packId); // to the end: most recently used
    }
    this.packs.set(packId, pack);
    return pack;
  }

  private async forget(packId: string): Promise<void> {
    const pack = this.packs.get(packId);
    this.packs.delete(packId);
    await pack?.reader.close().catch(() => undefined); // loses nothing of a read-only object
  }

  private bufferOf(bytes: number): Buffer {
    if (this.buffer.length < bytes) this.buffer = Buffer.allocUnsafeSlow(bytes * 2);
    return this.buffer.subarray(0, bytes);
  }
}

/** Reads of this size come at once where the page cache has them. */
const STEP_BYTES = 128 * 1024;

/** The bytes read, which are less than asked for where the object ends. */
async function readStepwise(reader: ObjectReader, into: Buffer, offset: number): Promise<number> {
  let got = 0;
  while (got < into.length) {
    const step = into.subarray(got, got + STEP_BYTES);
    const n = await reader.read(step, offset + got);
    got += n;
    if (n < step.length) break;
  }
  return got;
}

function endOf(frame: FooterFrame): number {
  return frame.offset + FRAME_HEADER_BYTES + frame.storedBytes;
}

/** Chunks decoded before the event loop turns: so that a stop is seen, and reads from the page cache may go on ({@link readCached}). */
const TURN_CHUNKS = 16;

serveWorker<DecodeStart, undefined>(async ({ handle, slab, slotBytes, queue, port }, context) => {
  if (handle.storeUrl === undefined)
    throw new Error('this store cannot be opened in another thread');
  adoptAligned(slab);
  const store = await openStore(handle.storeUrl);
  const reader = new FrameReader(contextOf(handle, store), slab, slotBytes);
  const orders = new DecodeQueue(queue, Math.floor(slab.byteLength / slotBytes));
  const post = (message: FromDecoder): void => {
    port.postMessage(message);
  };
  const work = async (): Promise<void> => {
    for (let chunks = 0; ;) {
      const group = context.isAborted() ? undefined : orders.take();
      if (group === undefined) {
        if (context.isAborted() || orders.sleep(context.index)) return;
        continue;
      }
      const { packId, frames, slots } = group;
      if (orders.answer(slots, await reader.decode(packId, frames, slots))) post('answer');
      chunks += slots.length;
      if (chunks < TURN_CHUNKS) continue;
      chunks = 0;
      await new Promise((resolve) => setImmediate(resolve));
    }
  };
  try {
    await new Promise<void>((resolve, reject) => {
      let working: Promise<void> | undefined;
      const begin = (): void => {
        working ??= work()
          .catch(reject)
          .finally(() => {
            working = undefined;
          });
      };
      const finish = (): void => {
        void Promise.resolve(working).then(() => resolve());
      };
      context.signal.addEventListener('abort', finish, { once: true });
      port.on('message', begin);
      loadNative();
      post('ready');
      if (context.isAborted()) finish();
      else begin();
    });
  } finally {
    port.close(); // else it keeps a thread that has failed
    await reader.close();
    await store.close();
  }
  return undefined;
}, loadNative);
