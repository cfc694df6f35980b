/**
 * A Store in memory that remembers every change, so that a test can ask what a crash would have left.
 *
 * `crashAt(i)` makes a new store with what survives a power cut after the first `i` operations of the log. An
 * operation counts as done for its caller ("acknowledged") when its promise resolves; a test that notes
 * `operations` right after that may demand its effect in every image with `i` at or above that number.
 */
import { createHash } from 'node:crypto';
import { B2Error } from '../../src/errors.js';
import {
  type Appender,
  checkName,
  type GetRange,
  type ObjectInfo,
  type ObjectReader,
  type PutOptions,
  type Store,
  type StoreSpace,
} from '../../src/repo/store.js';

/** Bytes that persist or get lost together when an unsynced tail is torn. */
const PAGE_BYTES = 4096;

export interface MemoryStoreOptions {
  /** Default true. */
  readonly canAppend?: boolean;
  /** Keep the log that `crashAt` needs. Default true; off for tests of large amounts. */
  readonly record?: boolean;
}

/**
 * What becomes of bytes that were appended and not synced, and of names that were not made durable:
 * - `none`: they all survive (the process was killed, the machine went on);
 * - `drop`: they are all gone (the least that the contract promises);
 * - `tear`: each page by itself may be there or read as zeros, the file ends anywhere, a name that was not synced
 *   is there or not; and operations under way at that moment, but not acknowledged, may have happened or not.
 */
export type TearMode = 'none' | 'drop' | 'tear';

export interface CrashOptions {
  readonly tear: TearMode;
  /** Uniform in [0, 1); needed for `tear`. */
  readonly random?: () => number;
}

export type OperationKind = 'put' | 'create' | 'append' | 'sync' | 'delete';

/** One entry of the log. */
export interface Operation {
  readonly kind: OperationKind;
  readonly name: string;
  /** Bytes put or appended; empty otherwise. */
  readonly data: Uint8Array;
  /** Length of the log when the call began. */
  readonly begun: number;
  /** Length of the log when its promise resolved; Infinity until then. */
  acknowledged: number;
  /** Which life of the name an append or sync belongs to: it does nothing to an object put there since. */
  readonly file: MemoryFile | undefined;
  /** For sync: bytes of the file that it covers. */
  readonly coveredBytes: number;
}

/** The bytes of one object; a replaced or deleted object lives on for those who have it open. */
class MemoryFile {
  #bytes: Buffer;
  #length: number;
  modifiedMs: number;

  constructor(bytes: Buffer, modifiedMs: number) {
    this.#bytes = bytes;
    this.#length = bytes.length;
    this.modifiedMs = modifiedMs;
  }

  get length(): number {
    return this.#length;
  }

  /** A view; valid until the next append. */
  view(): Buffer {
    return this.#bytes.subarray(0, this.#length);
  }

  append(data: Uint8Array): void {
    const needed = this.#length + data.length;
    if (needed > this.#bytes.length) {
      const larger = Buffer.alloc(Math.max(needed, this.#bytes.length * 2));
      larger.set(this.view());
      this.#bytes = larger;
    }
    this.#bytes.set(data, this.#length);
    this.#length = needed;
  }
}

function nextTurn(): Promise<void> {
  return new Promise((resolve) => setImmediate(resolve));
}

/** See the file comment. */
export class MemoryStore implements Store {
  readonly url = 'memory:';
  readonly canAppend: boolean;
  readonly #record: boolean;
  readonly #files = new Map<string, MemoryFile>();
  /** State before the first operation of the log. */
  readonly #base: ReadonlyMap<string, Buffer>;
  readonly #log: Operation[] = [];
  #ticks = 0;

  constructor(options: MemoryStoreOptions = {}, base: ReadonlyMap<string, Uint8Array> = new Map()) {
    this.canAppend = options.canAppend ?? true;
    this.#record = options.record ?? true;
    this.#base = new Map([...base].map(([name, data]) => [name, Buffer.from(data)]));
    for (const [name, data] of this.#base)
      this.#files.set(name, new MemoryFile(data, this.#tick()));
  }

  /** Operations in the log so far. */
  get operations(): number {
    return this.#log.length;
  }

  get log(): readonly Operation[] {
    return this.#log;
  }

  /** A new store, with a log of its own, holding what survives a crash after the first `count` operations. */
  crashAt(count: number, options: CrashOptions): MemoryStore {
    if (!this.#record) throw new Error('this MemoryStore keeps no log');
    if (!(count >= 0 && count <= this.#log.length)) throw new RangeError(`no such cut: ${count}`);
    const { tear } = options;
    const random = options.random ?? (() => 0);
    const image = new CrashImage(this.#base);
    this.#log.forEach((operation, index) => {
      if (index < count) {
        // The order in which things become durable before they are acknowledged is anybody's guess.
        const isOpen = operation.acknowledged > count;
        if (tear === 'tear' && isOpen && isAtomic(operation) && random() < 0.5) return;
        image.apply(operation);
      } else if (tear === 'tear' && operation.begun < count && isAtomic(operation)) {
        if (random() < 0.5) image.apply(operation);
      }
    });
    const canAppend = this.canAppend;
    return new MemoryStore({ canAppend }, image.survivors(tear, random));
  }

  /** A digest of the names and bytes that it holds now. */
  digest(): string {
    const hash = createHash('sha256');
    for (const name of [...this.#files.keys()].sort()) {
      const bytes = this.#existing(name).view();
      hash.update(`${name} ${bytes.length}\n`).update(bytes);
    }
    return hash.digest('hex');
  }

  /** A copy of the present state, as a store with a log of its own. */
  clone(): MemoryStore {
    const state = new Map([...this.#files].map(([name, file]) => [name, file.view()]));
    return new MemoryStore({ canAppend: this.canAppend, record: this.#record }, state);
  }

  async put(name: string, data: Uint8Array, options: PutOptions = {}): Promise<void> {
    checkName(name);
    const begun = this.#log.length;
    await nextTurn();
    if (options.ifAbsent === true && this.#files.has(name)) throw exists(name);
    await this.#putNow(name, Buffer.from(data), begun);
  }

  async putStream(name: string, parts: AsyncIterable<Uint8Array>): Promise<void> {
    checkName(name);
    const begun = this.#log.length;
    const taken: Buffer[] = [];
    for await (const part of parts) taken.push(Buffer.from(part));
    await this.#putNow(name, Buffer.concat(taken), begun);
  }

  async get(name: string, range?: GetRange): Promise<Buffer> {
    checkName(name);
    await nextTurn();
    const bytes = this.#existing(name).view();
    const from = range?.offset ?? 0;
    return Buffer.from(bytes.subarray(from, from + (range?.length ?? bytes.length)));
  }

  async open(name: string): Promise<ObjectReader> {
    checkName(name);
    await nextTurn();
    const file = this.#existing(name);
    let isOpen = true;
    return {
      sizeBytes: file.length,
      async read(into, offset) {
        if (!isOpen) throw new Error(`${name} is used after it was closed`);
        await nextTurn();
        const part = file.view().subarray(offset, offset + into.length);
        into.set(part);
        return part.length;
      },
      async close() {
        isOpen = false;
      },
    };
  }

  async stat(name: string): Promise<ObjectInfo | undefined> {
    checkName(name);
    await nextTurn();
    const file = this.#files.get(name);
    if (file === undefined) return undefined;
    return { name, sizeBytes: file.length, modifiedMs: file.modifiedMs };
  }

  async *list(prefix: string): AsyncIterable<ObjectInfo> {
    if (prefix !== '') checkName(prefix);
    await nextTurn();
    // A copy: the map may change while the caller takes its time.
    const files = Array.from(this.#files);
    for (const [name, file] of files) {
      if (prefix !== '' && !name.startsWith(`${prefix}/`)) continue;
      yield { name, sizeBytes: file.length, modifiedMs: file.modifiedMs };
    }
  }

  async delete(name: string): Promise<void> {
    checkName(name);
    const begun = this.#log.length;
    await nextTurn();
    if (!this.#files.delete(name)) return;
    const operation = this.#note({ kind: 'delete', name, begun });
    await nextTurn();
    this.#acknowledge(operation);
  }

  async openAppend(name: string, mode: 'create' | 'existing'): Promise<Appender> {
    checkName(name);
    if (!this.canAppend) {
      throw new B2Error('unsupported', `${this.url}: this store cannot append`);
    }
    const begun = this.#log.length;
    await nextTurn();
    if (mode === 'existing') return this.#appender(name, this.#existing(name));
    if (this.#files.has(name)) throw exists(name);
    const file = new MemoryFile(Buffer.alloc(0), this.#tick());
    this.#files.set(name, file);
    this.#acknowledge(this.#note({ kind: 'create', name, begun, file }));
    return this.#appender(name, file);
  }

  async space(): Promise<StoreSpace | undefined> {
    return undefined;
  }

  async close(): Promise<void> {}

  #appender(name: string, file: MemoryFile): Appender {
    let isOpen = true;
    let sizeBytes = file.length;
    let last: Promise<void> = Promise.resolve();
    const inOrder = (work: () => Promise<void>): Promise<void> => {
      if (!isOpen) return Promise.reject(new Error(`${name} is used after it was closed`));
      const done = last.then(work);
      last = done.catch(() => undefined);
      return done;
    };
    return {
      get sizeBytes() {
        return sizeBytes;
      },
      append: (data) => {
        const begun = this.#log.length;
        if (isOpen) sizeBytes += data.length;
        return inOrder(async () => {
          await nextTurn();
          const copy = Buffer.from(data);
          file.append(copy);
          file.modifiedMs = this.#tick();
          this.#acknowledge(this.#note({ kind: 'append', name, begun, file, data: copy }));
        });
      },
      sync: () => {
        const begun = this.#log.length;
        return inOrder(async () => {
          await nextTurn();
          const coveredBytes = file.length;
          const operation = this.#note({ kind: 'sync', name, begun, file, coveredBytes });
          await nextTurn();
          this.#acknowledge(operation);
        });
      },
      close: async () => {
        isOpen = false;
        await last;
      },
    };
  }

  async #putNow(name: string, data: Buffer, begun: number): Promise<void> {
    this.#files.set(name, new MemoryFile(data, this.#tick()));
    const operation = this.#note({ kind: 'put', name, begun, data });
    await nextTurn();
    this.#acknowledge(operation);
  }

  #existing(name: string): MemoryFile {
    const file = this.#files.get(name);
    if (file === undefined) throw new B2Error('not-found', `${name} does not exist`);
    return file;
  }

  #note(
    operation: Pick<Operation, 'kind' | 'name' | 'begun'> & Partial<Operation>,
  ): Operation | undefined {
    if (!this.#record) return undefined;
    const noted: Operation = {
      data: new Uint8Array(0),
      acknowledged: Infinity,
      file: undefined,
      coveredBytes: 0,
      ...operation,
    };
    this.#log.push(noted);
    return noted;
  }

  #acknowledge(operation: Operation | undefined): void {
    if (operation !== undefined) operation.acknowledged = this.#log.length;
  }

  /** A store's clock that has nothing to do with anybody else's. */
  #tick(): number {
    this.#ticks++;
    return this.#ticks;
  }
}

function exists(name: string): B2Error {
  return new B2Error('exists', `${name} exists already`);
}

/** Put, delete and sync happen wholly or not at all; what becomes of appends follows from the syncs. */
function isAtomic(operation: Operation): boolean {
  return operation.kind === 'put' || operation.kind === 'delete' || operation.kind === 'sync';
}

interface ImageFile {
  /** Made by this operation's file; undefined for puts and the base. */
  readonly file: MemoryFile | undefined;
  readonly parts: Uint8Array[];
  sizeBytes: number;
  durableBytes: number;
  nameDurable: boolean;
}

/** Replays a log, keeping apart what is durable and what is not. */
class CrashImage {
  readonly #files = new Map<string, ImageFile>();
  /** Appenders opened on an object that the log did not create: which object of the image they write to. */
  readonly #opened = new Map<MemoryFile, ImageFile>();

  constructor(base: ReadonlyMap<string, Buffer>) {
    for (const [name, data] of base) this.#files.set(name, durableFile(data));
  }

  apply(operation: Operation): void {
    const { kind, name, data } = operation;
    switch (kind) {
      case 'put':
        this.#files.set(name, durableFile(data));
        return;
      case 'delete':
        this.#files.delete(name);
        return;
      case 'create': {
        const { file } = operation;
        const made = { file, parts: [], sizeBytes: 0, durableBytes: 0, nameDurable: false };
        this.#files.set(name, made);
        if (file !== undefined) this.#opened.set(file, made);
        return;
      }
      case 'append': {
        const target = this.#target(operation);
        target?.parts.push(data);
        if (target !== undefined) target.sizeBytes += data.length;
        return;
      }
      case 'sync': {
        const target = this.#target(operation);
        if (target === undefined) return;
        target.durableBytes = Math.min(target.sizeBytes, operation.coveredBytes);
        target.nameDurable = true;
      }
    }
  }

  survivors(tear: TearMode, random: () => number): Map<string, Uint8Array> {
    const survivors = new Map<string, Uint8Array>();
    for (const [name, file] of this.#files) {
      const bytes = Buffer.concat(file.parts);
      if (tear === 'none') {
        survivors.set(name, bytes);
      } else if (tear === 'drop') {
        if (file.nameDurable) survivors.set(name, bytes.subarray(0, file.durableBytes));
      } else if (file.nameDurable || random() < 0.5) {
        survivors.set(name, tornTail(bytes, file.durableBytes, random));
      }
    }
    return survivors;
  }

  #target(operation: Operation): ImageFile | undefined {
    if (operation.file === undefined) return undefined;
    const known = this.#opened.get(operation.file);
    if (known !== undefined) return known;
    const found = this.#files.get(operation.name);
    if (found !== undefined) this.#opened.set(operation.file, found);
    return found;
  }
}

function durableFile(data: Uint8Array): ImageFile {
  const sizeBytes = data.length;
  return { file: undefined, parts: [data], sizeBytes, durableBytes: sizeBytes, nameDurable: true };
}

/** The file with an end anywhere in its unsynced bytes, whose pages each persisted or read as zeros. */
function tornTail(bytes: Buffer, durableBytes: number, random: () => number): Buffer {
  const unsynced = bytes.length - durableBytes;
  // A third each: everything but torn pages, cut at a page, cut anywhere.
  const kind = random();
  let end = bytes.length;
  if (kind > 1 / 3) end = durableBytes + Math.floor(random() * (unsynced + 1));
  if (kind > 2 / 3) end = Math.max(durableBytes, end - (end % PAGE_BYTES));
  const torn = Buffer.from(bytes.subarray(0, end));
  for (let page = durableBytes - (durableBytes % PAGE_BYTES); page < end; page += PAGE_BYTES) {
    const from = Math.max(page, durableBytes);
    if (random() < 0.3) torn.fill(0, from, Math.min(end, page + PAGE_BYTES));
  }
  return torn;
}
