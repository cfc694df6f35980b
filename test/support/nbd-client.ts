/** A small NBD client for tests: every byte can be sent wrongly, every reply is checked strictly. */
import { connect, type Socket } from 'node:net';

import { SocketReader } from '../../src/nbd/reader.js';

export interface OptionReply {
  readonly option: number;
  readonly type: number;
  readonly data: Buffer;
}

export interface Chunk {
  readonly type: number;
  readonly done: boolean;
  readonly cookie: bigint;
  readonly payload: Buffer;
}

export interface RequestFields {
  readonly command: number;
  readonly flags?: number;
  readonly cookie?: bigint;
  readonly offset?: bigint | number;
  readonly length?: number;
  readonly magic?: number;
}

export function requestBytes(fields: RequestFields): Buffer {
  const out = Buffer.alloc(28);
  out.writeUInt32BE(fields.magic ?? 0x25609513, 0);
  out.writeUInt16BE(fields.flags ?? 0, 4);
  out.writeUInt16BE(fields.command, 6);
  out.writeBigUInt64BE(fields.cookie ?? 1n, 8);
  out.writeBigUInt64BE(BigInt(fields.offset ?? 0), 16);
  out.writeUInt32BE(fields.length ?? 0, 24);
  return out;
}

export function optionBytes(
  option: number,
  data: Uint8Array = Buffer.alloc(0),
  length = data.length,
): Buffer {
  const head = Buffer.alloc(16);
  head.write('IHAVEOPT', 'latin1');
  head.writeUInt32BE(option, 8);
  head.writeUInt32BE(length, 12);
  return Buffer.concat([head, data]);
}

export function goBytes(name: string, infos: readonly number[] = []): Buffer {
  const bytes = Buffer.from(name);
  const out = Buffer.alloc(6 + bytes.length + 2 * infos.length);
  out.writeUInt32BE(bytes.length, 0);
  bytes.copy(out, 4);
  out.writeUInt16BE(infos.length, 4 + bytes.length);
  infos.forEach((info, i) => out.writeUInt16BE(info, 6 + bytes.length + 2 * i));
  return out;
}

export function metaBytes(name: string, queries: readonly string[]): Buffer {
  const u32 = (value: number): Buffer => {
    const b = Buffer.alloc(4);
    b.writeUInt32BE(value, 0);
    return b;
  };
  const texts = [name, ...queries].map((text) => Buffer.from(text));
  const [head, ...rest] = texts.map((text) => Buffer.concat([u32(text.length), text]));
  return Buffer.concat([head ?? u32(0), u32(queries.length), ...rest]);
}

export class NbdTestClient {
  readonly socket: Socket;
  readonly reader: SocketReader;
  /** Resolves when the server has closed the connection. */
  readonly gone: Promise<void>;

  private constructor(socket: Socket) {
    this.socket = socket;
    this.reader = new SocketReader(socket);
    this.gone = new Promise((done) => socket.once('close', () => done()));
  }

  static async connect(path: string): Promise<NbdTestClient> {
    const socket = connect(path);
    socket.on('error', () => undefined);
    await new Promise<void>((done, reject) => {
      socket.once('connect', () => done());
      socket.once('error', reject);
    });
    return new NbdTestClient(socket);
  }

  /** Connects and gets past the greeting. */
  static async greet(path: string, clientFlags = 3): Promise<NbdTestClient> {
    const client = await NbdTestClient.connect(path);
    const greeting = await client.reader.take(18);
    if (greeting.toString('latin1', 0, 16) !== 'NBDMAGICIHAVEOPT') throw new Error('no greeting');
    if (greeting.readUInt16BE(16) !== 3) throw new Error('wrong handshake flags');
    const flags = Buffer.alloc(4);
    flags.writeUInt32BE(clientFlags, 0);
    client.write(flags);
    return client;
  }

  /** Connects and goes into transmission; structured with `base:allocation` unless told otherwise. */
  static async go(path: string, name = '', structured = true): Promise<NbdTestClient> {
    const client = await NbdTestClient.greet(path);
    if (structured) {
      await client.option(8);
      await client.option(10, metaBytes(name, ['base:allocation']));
    }
    const replies = await client.option(7, goBytes(name, [3]));
    const last = replies.at(-1);
    if (last?.type !== 1) throw new Error(`GO was refused: ${last?.data.toString()}`);
    return client;
  }

  write(bytes: Uint8Array): void {
    this.socket.write(bytes);
  }

  /** Sends an option and reads up to the final reply. */
  async option(option: number, data?: Uint8Array, length?: number): Promise<OptionReply[]> {
    this.write(optionBytes(option, data, length));
    return await this.optionReplies();
  }

  async optionReplies(): Promise<OptionReply[]> {
    const replies: OptionReply[] = [];
    for (;;) {
      const head = await this.reader.take(20);
      if (head.readBigUInt64BE(0) !== 0x3e889045565a9n) throw new Error('no option reply magic');
      const type = head.readUInt32BE(12);
      const data = await this.reader.take(head.readUInt32BE(16));
      replies.push({ option: head.readUInt32BE(8), type, data });
      if (type === 1 || type >= 0x8000_0000) return replies;
    }
  }

  async chunk(): Promise<Chunk> {
    const head = await this.reader.take(20);
    if (head.readUInt32BE(0) !== 0x668e33ef) throw new Error('no chunk magic');
    const payload = await this.reader.take(head.readUInt32BE(16));
    return {
      type: head.readUInt16BE(6),
      done: (head.readUInt16BE(4) & 1) !== 0,
      cookie: head.readBigUInt64BE(8),
      payload,
    };
  }

  /** Chunks of one reply; nothing else may be under way. */
  async reply(): Promise<Chunk[]> {
    const chunks: Chunk[] = [];
    for (;;) {
      const chunk = await this.chunk();
      chunks.push(chunk);
      if (chunk.done) return chunks;
    }
  }

  /** Sends a request and resolves to its error value, 0 for success (structured replies). */
  async outcome(fields: RequestFields, payload?: Uint8Array): Promise<number> {
    this.write(requestBytes(fields));
    if (payload !== undefined) this.write(payload);
    const last = (await this.reply()).at(-1);
    if (last === undefined) throw new Error('no reply');
    if (last.cookie !== (fields.cookie ?? 1n)) throw new Error('wrong cookie');
    return last.type === 0x8001 ? last.payload.readUInt32BE(0) : 0;
  }

  /** Reads through a structured reply, checking that its chunks cover the range exactly. */
  async read(offset: number, length: number, flags = 0): Promise<Buffer> {
    this.write(requestBytes({ command: 0, offset, length, flags }));
    const out = Buffer.alloc(length, 0xee);
    const covered = new Uint8Array(length);
    for (const { type, payload } of await this.reply()) {
      if (type === 0) continue;
      if (type === 0x8001)
        throw Object.assign(new Error(payload.toString('utf8', 6)), {
          errno: payload.readUInt32BE(0),
        });
      const at = Number(payload.readBigUInt64BE(0)) - offset;
      const bytes = type === 2 ? payload.readUInt32BE(8) : payload.length - 8;
      if (bytes === 0 || at < 0 || at + bytes > length)
        throw new Error('a chunk outside the request');
      if (covered.subarray(at, at + bytes).includes(1)) throw new Error('overlapping chunks');
      covered.fill(1, at, at + bytes);
      if (type === 2) out.fill(0, at, at + bytes);
      else payload.copy(out, at, 8);
    }
    if (covered.includes(0)) throw new Error('the reply does not cover the request');
    return out;
  }

  close(): void {
    this.socket.destroy();
  }
}
