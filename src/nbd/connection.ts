/**
 * One client: handshake, then requests until it goes. Requests run side by side and are answered as they finish.
 *
 * Memory is bounded by {@link NbdLimits}: a request is taken from the socket only when there is room for its bytes
 * beside those of the requests under way and the replies not yet sent, so that a client that sends without reading is
 * held back by TCP. Whatever a client sends, it gets an error reply or its connection is closed; nothing it says makes
 * this side allocate more than the limits, or touch bytes outside the image.
 */
import type { Socket } from 'node:net';
import type { TlsOptions, TLSSocket } from 'node:tls';

import type { BufferPool } from '../buffer-pool.js';
import { B2Error, isKind, messageOf } from '../errors.js';
import { isZeroView, type Image, type ImageExtent, type Lending, type Loan } from '../image.js';
import * as p from './protocol.js';
import { EndOfStream, SocketReader } from './reader.js';
import { enlargeSendBuffer } from './send-buffer.js';
import { loadTls } from './tls.js';
import { isWritable, type WritableImage } from './writable.js';

export interface NbdLimits {
  /** Connections at a time; further ones are closed at once. */
  readonly connections: number;
  /** Requests under way on a connection. */
  readonly requestsInFlight: number;
  /** Bytes of requests under way and unsent replies on a connection. */
  readonly bytesInFlight: number;
  /** How long a client may take from connecting to the end of the handshake. */
  readonly handshakeMs: number;
  /** How long {@link NbdServer.close} waits for requests under way and for replies to be taken. */
  readonly graceMs: number;
}

/** The largest payload of a read or write, as advertised. 32 MiB is what the specification asks for. */
export const MAX_PAYLOAD_BYTES = 32 * 1024 * 1024;

/** Reads from this size on are answered with holes left out; below, asking for them costs more than it saves. */
const SPARSE_READ_BYTES = 64 * 1024;
/** At most this many chunks answer a read, so that their headers stay small beside the data. */
const SPARSE_READ_CHUNKS = 64;
/** Holes shorter than this are sent as data. */
const MIN_HOLE_BYTES = 4096;
/** Runs in one reply to a block status request; a client asks again for the rest. */
const STATUS_RUNS = 8192;
/** Longest option that is read; nothing legitimate comes near it. */
const MAX_OPTION_BYTES = 64 * 1024;
/** Longest option that is skipped to say so; beyond, the connection is closed. */
const MAX_SKIPPED_OPTION_BYTES = 32 * 1024 * 1024;
const CACHE_STEP_BYTES = 1024 * 1024;
/** Above this, and surely above Node's high water mark, unsent bytes count and `drain` will come. */
const UNSENT_FREE_BYTES = 256 * 1024;

/** What a connection needs of its server. */
export interface ConnectionHost {
  readonly limits: NbdLimits;
  /** Memory for answers. */
  readonly buffers: BufferPool;
  /** undefined: STARTTLS is refused. */
  readonly tls: TlsOptions | undefined;
  /** Nothing but STARTTLS and ABORT is answered before TLS is on. */
  readonly tlsRequired: boolean;
  exportNames(): readonly { readonly name: string; readonly description: string }[];
  /** The export of that name (the empty name is the default one); undefined where there is none. */
  find(name: string): ServedExport | undefined;
  /** Something to tell a person: damaged data, a failing disk, a bug. */
  report(what: string, error: unknown): void;
}

/** An export as connections see it; all of them share its image. */
export interface ServedExport {
  readonly name: string;
  readonly description: string;
  /** Opened by the first call; the server closes it. */
  image(): Promise<Image | WritableImage>;
}

interface Session {
  readonly served: ServedExport;
  readonly image: Image | WritableImage;
}

export class Connection {
  readonly #host: ConnectionHost;
  readonly #peer: string;
  #socket: Socket;
  #reader: SocketReader;
  #secure = false;
  #structured = false;
  /** The export for which `base:allocation` was selected last. */
  #allocationOf: ServedExport | undefined;
  #transmitting = false;
  #closing = false;
  #inFlight = 0;
  #bytesInFlight = 0;
  #corked = false;
  /** What the socket has not sent yet. */
  readonly #loans = new Set<Loan>();
  /** Wakes whoever waits for room or for idleness. */
  #wakers: (() => void)[] = [];

  constructor(host: ConnectionHost, socket: Socket, peer: string) {
    this.#host = host;
    this.#peer = peer;
    this.#socket = socket;
    this.#reader = this.#adopt(socket);
  }

  /** Serves the client; resolves when it has gone and nothing of it is under way. Never rejects. */
  async run(): Promise<void> {
    try {
      const session = await this.#negotiate();
      if (session !== undefined) {
        this.#transmitting = true;
        await this.#transmit(session);
      }
    } catch (error) {
      if (error instanceof p.ProtocolViolation) this.#socket.destroy();
      else if (!(error instanceof EndOfStream)) {
        this.#host.report(`client ${this.#peer}`, error);
        this.#socket.destroy();
      }
    }
    await this.#idle();
    // Sends what is left, says goodbye (TLS too), then closes.
    this.#socket.destroySoon();
  }

  /** Stops serving: requests under way are finished, later ones refused with ESHUTDOWN; then the socket is closed. */
  async shutDown(): Promise<void> {
    this.#closing = true;
    if (!this.#transmitting) {
      this.#socket.destroy();
      return;
    }
    // What has come over a unix socket stays with the client, and one that waits for nothing may not even look.
    const socket = this.#socket;
    const isQuiet =
      socket.remoteFamily === undefined && this.#inFlight === 0 && socket.writableLength === 0;
    await this.#idle();
    this.#uncork();
    // Of any other client requests that still come would take with them what it has not received yet, so it is not destroyed: it
    // closes its side, and `run` ends; the server waits for that no longer than for all else.
    if (isQuiet) socket.destroySoon();
    else socket.end();
  }

  /** Closes the socket now, whatever is under way. */
  destroy(): void {
    this.#socket.destroy();
  }

  get transmitting(): boolean {
    return this.#transmitting;
  }

  #adopt(socket: Socket): SocketReader {
    const wake = (): void => this.#wake();
    // A reset is no news: whoever reads is told by the `close` that follows.
    socket.on('error', () => undefined);
    socket.on('drain', wake);
    socket.on('close', () => {
      // Nothing is sent from that memory any more, whatever became of it.
      for (const loan of this.#loans) this.#giveBack(loan);
      wake();
    });
    return new SocketReader(socket);
  }

  // ---- handshake ------------------------------------------------------------------------------------------------

  async #negotiate(): Promise<Session | undefined> {
    this.#socket.write(p.buildGreeting());
    const client = p.parseClientFlags(await this.#reader.take(p.CLIENT_FLAGS_BYTES));
    for (;;) {
      const { option, length } = p.parseOptionHeader(
        await this.#reader.take(p.OPTION_HEADER_BYTES),
      );
      if (!client.fixedNewstyle && option !== p.Option.exportName) {
        throw new p.ProtocolViolation('options need fixed newstyle');
      }
      if (length > MAX_OPTION_BYTES) {
        if (length > MAX_SKIPPED_OPTION_BYTES || option === p.Option.exportName) {
          throw new p.ProtocolViolation(`an option of ${length} bytes`);
        }
        await this.#reader.skip(length);
        await this.#answer(option, p.Reply.errTooBig, 'the option is too long');
        continue;
      }
      const data = await this.#reader.take(length);
      if (option === p.Option.abort) {
        await this.#answer(option, p.Reply.ack);
        return undefined;
      }
      if (option === p.Option.exportName) return await this.#exportName(data, client.noZeroes);
      if (this.#closing) {
        await this.#answer(option, p.Reply.errShutdown, 'the server is shutting down');
      } else if (option === p.Option.startTls) {
        await this.#startTls(data);
      } else if (this.#host.tlsRequired && !this.#secure) {
        await this.#answer(option, p.Reply.errTlsRequired, 'this server wants TLS first');
      } else {
        const session = await this.#option(option, data);
        if (session !== undefined) return session;
      }
    }
  }

  async #option(option: number, data: Buffer): Promise<Session | undefined> {
    switch (option) {
      case p.Option.list:
        if (data.length > 0)
          return await this.#answer(option, p.Reply.errInvalid, 'LIST takes no data');
        for (const { name, description } of this.#host.exportNames()) {
          await this.#send(
            p.buildOptionReply(option, p.Reply.server, p.buildListEntry(name, description)),
          );
        }
        return await this.#answer(option, p.Reply.ack);
      case p.Option.structuredReply:
        if (data.length > 0) {
          return await this.#answer(option, p.Reply.errInvalid, 'STRUCTURED_REPLY takes no data');
        }
        this.#structured = true;
        return await this.#answer(option, p.Reply.ack);
      case p.Option.info:
      case p.Option.go:
        return await this.#info(option, data);
      case p.Option.listMetaContext:
      case p.Option.setMetaContext:
        return await this.#metaContext(option, data);
      default:
        return await this.#answer(option, p.Reply.errUnsupported, 'unknown option');
    }
  }

  async #exportName(data: Buffer, noZeroes: boolean): Promise<Session> {
    const name = p.parseString(data);
    const served = name === undefined ? undefined : this.#host.find(name);
    const locked = this.#host.tlsRequired && !this.#secure;
    // This option knows no errors: closing is the answer.
    if (served === undefined || locked || this.#closing)
      throw new p.ProtocolViolation('no such export');
    const image = await this.#open(served);
    if (image === undefined) throw new p.ProtocolViolation('the export cannot be opened');
    await this.#send(p.buildExportNameReply(image.sizeBytes, this.#flagsOf(image), noZeroes));
    return { served, image };
  }

  async #info(option: number, data: Buffer): Promise<Session | undefined> {
    const request = p.parseInfoRequest(data);
    if (request === undefined)
      return await this.#answer(option, p.Reply.errInvalid, 'malformed request');
    const served = request.name === undefined ? undefined : this.#host.find(request.name);
    if (served === undefined)
      return await this.#answer(option, p.Reply.errUnknown, 'no export of that name');
    const image = await this.#open(served);
    if (image === undefined) {
      return await this.#answer(
        option,
        p.Reply.errUnknown,
        'the export cannot be opened; see the log of the server',
      );
    }
    const info = (payload: Buffer): Promise<void> =>
      this.#send(p.buildOptionReply(option, p.Reply.info, payload));
    await info(p.buildInfoExport(image.sizeBytes, this.#flagsOf(image)));
    if (request.requests.has(p.Info.name)) await info(p.buildInfoString(p.Info.name, served.name));
    if (request.requests.has(p.Info.description) && served.description !== '') {
      await info(p.buildInfoString(p.Info.description, served.description));
    }
    if (request.requests.has(p.Info.blockSize)) {
      await info(p.buildInfoBlockSize(1, preferredBlockBytes(image), MAX_PAYLOAD_BYTES));
    }
    await this.#answer(option, p.Reply.ack);
    return option === p.Option.go ? { served, image } : undefined;
  }

  async #metaContext(option: number, data: Buffer): Promise<undefined> {
    const set = option === p.Option.setMetaContext;
    // Also when it fails: what was selected before is gone.
    if (set) this.#allocationOf = undefined;
    if (!this.#structured)
      return await this.#answer(option, p.Reply.errInvalid, 'needs structured replies');
    const request = p.parseMetaContextRequest(data);
    if (request === undefined)
      return await this.#answer(option, p.Reply.errInvalid, 'malformed request');
    const served = request.name === undefined ? undefined : this.#host.find(request.name);
    if (served === undefined)
      return await this.#answer(option, p.Reply.errUnknown, 'no export of that name');
    const named = request.queries.includes(p.ALLOCATION_CONTEXT);
    const wildcard = request.queries.length === 0 || request.queries.includes('base:');
    if (named || (!set && wildcard)) {
      if (set) this.#allocationOf = served;
      const context = p.buildMetaContext(set ? p.ALLOCATION_CONTEXT_ID : 0, p.ALLOCATION_CONTEXT);
      await this.#send(p.buildOptionReply(option, p.Reply.metaContext, context));
    }
    return await this.#answer(option, p.Reply.ack);
  }

  async #startTls(data: Buffer): Promise<void> {
    const option = p.Option.startTls;
    if (data.length > 0)
      return await this.#answer(option, p.Reply.errInvalid, 'STARTTLS takes no data');
    const { tls } = this.#host;
    if (tls === undefined)
      return await this.#answer(option, p.Reply.errPolicy, 'this server has no TLS');
    if (this.#secure) return await this.#answer(option, p.Reply.errInvalid, 'TLS is on already');
    // No waiting between the answer and the hand-over: the client's first TLS bytes must find the TLS socket.
    const plain = this.#socket;
    plain.write(p.buildOptionReply(option, p.Reply.ack));
    // Options that were sent along would otherwise count as if they had come encrypted.
    if (this.#reader.detach() > 0) throw new p.ProtocolViolation('plain bytes after STARTTLS');
    this.#socket = await new Promise<TLSSocket>((resolve, reject) => {
      const fail = (): void => reject(new EndOfStream('the TLS handshake failed'));
      // A server of its own, never listening: it checks the client's certificate, which a bare TLSSocket does not.
      const server = loadTls().createServer(tls, (secure) => {
        // Before this turn ends, or the first bytes would be lost.
        this.#reader = this.#adopt(secure);
        resolve(secure);
      });
      server.on('tlsClientError', fail);
      plain.once('close', fail);
      server.emit('connection', plain);
    });
    this.#secure = true;
    this.#structured = false;
    this.#allocationOf = undefined;
  }

  async #open(served: ServedExport): Promise<Image | WritableImage | undefined> {
    try {
      return await served.image();
    } catch (error) {
      this.#host.report(`export ${served.name}`, error);
      return undefined;
    }
  }

  #flagsOf(image: Image): number {
    const flag = p.TransmissionFlag;
    const common =
      flag.hasFlags |
      flag.sendFlush |
      flag.canMultiConn |
      flag.sendCache |
      (this.#structured ? flag.sendDf : 0);
    if (!isWritable(image)) return common | flag.readOnly;
    return common | flag.sendFua | flag.sendTrim | flag.sendWriteZeroes | flag.sendFastZero;
  }

  async #answer(option: number, type: p.Reply, message = ''): Promise<undefined> {
    await this.#send(p.buildOptionReply(option, type, p.clippedUtf8(message)));
    return undefined;
  }

  /** Sends in the handshake: waits while much is unsent. */
  async #send(bytes: Buffer): Promise<void> {
    this.#socket.write(bytes);
    while (this.#socket.writableLength > UNSENT_FREE_BYTES) {
      if (this.#socket.destroyed) throw new EndOfStream('the connection ended');
      await this.#woken();
    }
  }

  // ---- transmission ---------------------------------------------------------------------------------------------

  async #transmit(session: Session): Promise<void> {
    enlargeSendBuffer(this.#socket);
    for (;;) {
      const header =
        this.#reader.tryTake(p.REQUEST_HEADER_BYTES) ??
        (await this.#reader.take(p.REQUEST_HEADER_BYTES));
      const request = p.parseRequest(header);
      if (request.command === p.Command.disconnect) return;
      const cost = costOf(request);
      while (!this.#hasRoom(cost)) {
        if (this.#socket.destroyed) throw new EndOfStream('the connection ended');
        await this.#woken();
      }
      let payload: Buffer | undefined;
      if (request.command === p.Command.write) {
        if (request.length > MAX_PAYLOAD_BYTES) {
          await this.#reader.skip(request.length);
        } else if (request.length > 0) {
          this.#bytesInFlight += cost;
          try {
            payload =
              this.#reader.tryTake(request.length) ?? (await this.#reader.take(request.length));
          } finally {
            this.#bytesInFlight -= cost;
          }
        }
      }
      const refusal = this.#refusal(session, request);
      if (refusal !== undefined) this.#fail(request, refusal[0], refusal[1]);
      else this.#start(session, request, payload, cost);
    }
  }

  /** Why a request cannot be carried out; undefined: it can. */
  #refusal(session: Session, request: p.Request): readonly [p.NbdError, string] | undefined {
    const { command, flags, offset, length } = request;
    const { image } = session;
    const writes =
      command === p.Command.write ||
      command === p.Command.trim ||
      command === p.Command.writeZeroes;
    if (this.#closing) return [p.NbdError.ESHUTDOWN, 'the server is shutting down'];
    if (writes && !isWritable(image)) return [p.NbdError.EPERM, 'the export is read-only'];
    const allowed =
      allowedFlags(command, this.#structured) | (isWritable(image) ? p.CommandFlag.fua : 0);
    if (allowed < 0) return [p.NbdError.EINVAL, `unknown command ${command}`];
    if ((flags & ~allowed) !== 0)
      return [p.NbdError.EINVAL, `flags 0x${flags.toString(16)} do not go with this command`];
    if (command === p.Command.flush) {
      return offset === 0 && length === 0
        ? undefined
        : [p.NbdError.EINVAL, 'a flush has no offset and no length'];
    }
    if (offset + length > image.sizeBytes) {
      const full = command === p.Command.write || command === p.Command.writeZeroes;
      return [
        full ? p.NbdError.ENOSPC : p.NbdError.EINVAL,
        'the range goes beyond the end of the export',
      ];
    }
    if (command === p.Command.blockStatus) {
      if (this.#allocationOf !== session.served)
        return [p.NbdError.EINVAL, 'no metadata context was selected'];
      if (length === 0) return [p.NbdError.EINVAL, 'a block status request has a length'];
    }
    if (length > MAX_PAYLOAD_BYTES) {
      const tooLong = `${length} bytes are more than ${MAX_PAYLOAD_BYTES}`;
      if (command === p.Command.read) {
        return [this.#structured ? p.NbdError.EOVERFLOW : p.NbdError.EINVAL, tooLong];
      }
      if (command === p.Command.write) return [p.NbdError.EINVAL, tooLong];
      if (command === p.Command.cache) return [p.NbdError.EOVERFLOW, tooLong];
    }
    return undefined;
  }

  #start(session: Session, request: p.Request, payload: Buffer | undefined, cost: number): void {
    this.#inFlight++;
    this.#bytesInFlight += cost;
    if (request.command === p.Command.read && request.length > 0) {
      let lending: Lending;
      try {
        lending = session.image.lend?.(request.offset, request.length);
        // Nearly all requests of who reads on and on: what they want is here.
        if (lending !== undefined && !(lending instanceof Promise)) {
          this.#replyLoan(request, lending);
          this.#finished(cost);
          return;
        }
      } catch (error) {
        lending = Promise.reject(error);
      }
      if (lending !== undefined) {
        this.#settle(session, request, cost, this.#readLate(session, request, lending));
        return;
      }
    }
    const reply = this.#perform(session, request, payload).then((bytes) =>
      this.#reply(bytes, request.command === p.Command.read),
    );
    this.#settle(session, request, cost, reply);
  }

  async #readLate(
    session: Session,
    request: p.Request,
    lending: Promise<Loan | undefined>,
  ): Promise<void> {
    const loan = await lending;
    if (loan === undefined) this.#reply(await this.#read(session.image, request), true);
    else this.#replyLoan(request, loan);
  }

  #settle(session: Session, request: p.Request, cost: number, replied: Promise<void>): void {
    replied
      .catch((error: unknown) => this.#performFailed(session, request, error))
      .finally(() => this.#finished(cost))
      // Only a bug in the lines above can get here; the client must not wait for a reply for ever.
      .catch((error: unknown) => {
        this.#host.report(`client ${this.#peer}`, error);
        this.#socket.destroy();
      });
  }

  #finished(cost: number): void {
    this.#inFlight--;
    this.#bytesInFlight -= cost;
    this.#wake();
  }

  async #perform(
    session: Session,
    request: p.Request,
    payload: Buffer | undefined,
  ): Promise<Buffer> {
    const { command, offset, length, flags } = request;
    const { image } = session;
    switch (command) {
      case p.Command.read:
        return await this.#read(image, request);
      case p.Command.cache:
        await warm(image, offset, length);
        return this.#success(request);
      case p.Command.blockStatus:
        return await blockStatus(image, request);
      case p.Command.flush:
        if (isWritable(image)) await image.flush();
        return this.#success(request);
      default:
    }
    if (!isWritable(image)) throw new Error(`command ${command} on a read-only image`);
    switch (command) {
      case p.Command.write:
        if (payload !== undefined) await image.write(payload, offset);
        break;
      case p.Command.trim:
        await image.trim(offset, length);
        break;
      case p.Command.writeZeroes: {
        const allocate = (flags & p.CommandFlag.noHole) !== 0;
        if (allocate && (flags & p.CommandFlag.fastZero) !== 0) {
          return this.#failure(
            request,
            p.NbdError.ENOTSUP,
            'zeros that take space are no faster than writing',
          );
        }
        await image.zero(offset, length, allocate);
        break;
      }
      default:
        throw new Error(`command ${command} cannot be carried out`);
    }
    if ((flags & p.CommandFlag.fua) !== 0) await image.flush();
    return this.#success(request);
  }

  async #read(image: Image, request: p.Request): Promise<Buffer> {
    const { offset, length, flags } = request;
    // No content chunk may be empty: libnbd gives the connection up over one.
    if (length === 0) return this.#success(request);
    if (!this.#structured) {
      const reply = this.#host.buffers.take(p.SIMPLE_REPLY_BYTES + length);
      p.putSimpleReply(reply, 0, request, 0);
      await image.read(reply.subarray(p.SIMPLE_REPLY_BYTES), offset);
      return reply;
    }
    const sparse = length >= SPARSE_READ_BYTES && (flags & p.CommandFlag.dontFragment) === 0;
    const chunks = sparse
      ? await chunksOf(image, offset, length)
      : [{ offset, length, hole: false }];
    let bytes = 0;
    for (const chunk of chunks)
      bytes += chunk.hole ? p.HOLE_CHUNK_BYTES : p.DATA_CHUNK_HEADER_BYTES + chunk.length;
    const reply = this.#host.buffers.take(bytes);
    const reads: Promise<void>[] = [];
    let at = 0;
    chunks.forEach((chunk, i) => {
      const last = i === chunks.length - 1;
      if (chunk.hole) {
        p.putHoleChunk(reply, at, request, chunk.offset, chunk.length, last);
        at += p.HOLE_CHUNK_BYTES;
      } else {
        p.putDataChunkHeader(reply, at, request, chunk.offset, chunk.length, last);
        at += p.DATA_CHUNK_HEADER_BYTES;
        reads.push(image.read(reply.subarray(at, at + chunk.length), chunk.offset));
        at += chunk.length;
      }
    });
    // All of them, also after a failure: none may go on filling the buffer of a request that counts as finished.
    const results = await Promise.allSettled(reads);
    for (const result of results) if (result.status === 'rejected') throw result.reason;
    return reply;
  }

  #success(request: p.Request): Buffer {
    return this.#structured ? p.buildNoneChunk(request) : p.buildSimpleReply(request, 0);
  }

  #failure(request: p.Request, error: p.NbdError, message: string): Buffer {
    return this.#structured
      ? p.buildErrorChunk(request, error, message)
      : p.buildSimpleReply(request, error);
  }

  #fail(request: p.Request, error: p.NbdError, message: string): void {
    this.#reply(this.#failure(request, error, message));
  }

  #performFailed(session: Session, request: p.Request, error: unknown): void {
    const { code, message } = errorForClient(request, error);
    const range =
      request.command === p.Command.flush ? '' : `, bytes ${request.offset}+${request.length}`;
    this.#host.report(`export ${session.served.name}${range}`, error);
    this.#fail(request, code, message);
  }

  /** Replies of one turn of the event loop leave in one system call. */
  #cork(): void {
    if (this.#corked) return;
    this.#corked = true;
    this.#socket.cork();
    setImmediate(() => this.#uncork());
  }

  /** `isOurs`: of the host's buffers. */
  #reply(bytes: Buffer, isOurs = false): void {
    const socket = this.#socket;
    // After its end was said a write would destroy it, and what it still has to send is lost.
    if (socket.destroyed || socket.writableEnded) return;
    this.#cork();
    if (!isOurs) socket.write(bytes);
    else
      socket.write(bytes, (error) => {
        // Taken by the kernel, or (TLS) encrypted. Of a socket that is gone nobody knows.
        if ((error === undefined || error === null) && !socket.destroyed)
          this.#host.buffers.give(bytes);
      });
  }

  /** Answers a read with what the image has lent; it goes to the socket as it lies there. */
  #replyLoan(request: p.Request, loan: Loan): void {
    const socket = this.#socket;
    if (socket.destroyed || socket.writableEnded) {
      loan.release();
      return;
    }
    let parts: readonly Uint8Array[];
    try {
      parts = (this.#structured ? chunkedReply : simpleReply)(request, loan.views);
    } catch (error) {
      loan.release();
      throw error;
    }
    this.#cork();
    this.#loans.add(loan);
    const last = parts.length - 1;
    for (const [i, part] of parts.entries()) {
      if (i < last) socket.write(part);
      else
        socket.write(part, (error) => {
          // Taken by the kernel, or (TLS) encrypted. Where it is neither the end of the socket says that nobody needs it.
          if ((error === undefined || error === null) && !socket.destroyed) this.#giveBack(loan);
        });
    }
  }

  #giveBack(loan: Loan): void {
    if (this.#loans.delete(loan)) loan.release();
  }

  #uncork(): void {
    if (!this.#corked) return;
    this.#corked = false;
    this.#socket.uncork();
  }

  // ---- waiting --------------------------------------------------------------------------------------------------

  #hasRoom(cost: number): boolean {
    const { requestsInFlight, bytesInFlight } = this.#host.limits;
    const unsent = this.#socket.writableLength;
    const held = this.#bytesInFlight + (unsent > UNSENT_FREE_BYTES ? unsent : 0);
    // One request always goes, however small the limit.
    return this.#inFlight < requestsInFlight && (held === 0 || held + cost <= bytesInFlight);
  }

  async #idle(): Promise<void> {
    while (this.#inFlight > 0) await this.#woken();
  }

  #woken(): Promise<void> {
    return new Promise((resolve) => this.#wakers.push(resolve));
  }

  #wake(): void {
    const wakers = this.#wakers;
    if (wakers.length === 0) return;
    this.#wakers = [];
    for (const wake of wakers) wake();
  }
}

/** Bytes that a request holds in memory while it is under way. */
function costOf(request: p.Request): number {
  switch (request.command) {
    case p.Command.read:
    case p.Command.write:
      return request.length > MAX_PAYLOAD_BYTES ? 0 : request.length;
    case p.Command.cache:
      return CACHE_STEP_BYTES;
    case p.Command.blockStatus:
      return STATUS_RUNS * 8;
    default:
      return 0;
  }
}

/** The flags beside FUA that a command may carry; negative: there is no such command. */
function allowedFlags(command: number, structured: boolean): number {
  switch (command) {
    case p.Command.read:
      return structured ? p.CommandFlag.dontFragment : 0;
    case p.Command.write:
    case p.Command.flush:
    case p.Command.trim:
    case p.Command.cache:
      return 0;
    case p.Command.writeZeroes:
      return p.CommandFlag.noHole | p.CommandFlag.fastZero;
    case p.Command.blockStatus:
      return p.CommandFlag.requireOne;
    default:
      return -1;
  }
}

function preferredBlockBytes(image: Image): number {
  // An overlay works in blocks; an image is stored in chunks of about this size.
  return isWritable(image) ? 4096 : 65536;
}

function simpleReply(request: p.Request, views: readonly Uint8Array[]): readonly Uint8Array[] {
  const header = Buffer.allocUnsafe(p.SIMPLE_REPLY_BYTES);
  p.putSimpleReply(header, 0, request, 0);
  return [header, ...views];
}

/** Headers and data of the chunks that answer a read; holes are left out of large ones, as in {@link chunksOf}. */
function chunkedReply(request: p.Request, views: readonly Uint8Array[]): readonly Uint8Array[] {
  const isSparse =
    request.length >= SPARSE_READ_BYTES && (request.flags & p.CommandFlag.dontFragment) === 0;
  const runs: { hole: boolean; length: number; readonly views: Uint8Array[] }[] = [];
  for (const view of views) {
    const hole =
      isSparse &&
      view.byteLength >= MIN_HOLE_BYTES &&
      runs.length < SPARSE_READ_CHUNKS &&
      isZeroView(view);
    const last = runs.at(-1);
    if (last !== undefined && last.hole === hole) {
      last.length += view.byteLength;
      last.views.push(view);
    } else runs.push({ hole, length: view.byteLength, views: [view] });
  }
  const headers = Buffer.allocUnsafe(
    runs.length * Math.max(p.HOLE_CHUNK_BYTES, p.DATA_CHUNK_HEADER_BYTES),
  );
  const parts: Uint8Array[] = [];
  let { offset } = request;
  let at = 0;
  for (const [i, { hole, length, views: data }] of runs.entries()) {
    const isLast = i === runs.length - 1;
    const bytes = hole ? p.HOLE_CHUNK_BYTES : p.DATA_CHUNK_HEADER_BYTES;
    if (hole) p.putHoleChunk(headers, at, request, offset, length, isLast);
    else p.putDataChunkHeader(headers, at, request, offset, length, isLast);
    parts.push(headers.subarray(at, at + bytes));
    if (!hole) parts.push(...data);
    at += bytes;
    offset += length;
  }
  return parts;
}

/** The chunks that answer a read: the image's extents with short holes filled in. */
async function chunksOf(
  image: Image,
  offset: number,
  length: number,
): Promise<readonly ImageExtent[]> {
  const end = offset + length;
  const chunks: { offset: number; length: number; hole: boolean }[] = [];
  let at = offset;
  for (const extent of await image.extents(offset, length, SPARSE_READ_CHUNKS)) {
    const hole = extent.hole && extent.length >= MIN_HOLE_BYTES;
    const last = chunks.at(-1);
    if (last !== undefined && last.hole === hole) last.length += extent.length;
    else chunks.push({ offset: extent.offset, length: extent.length, hole });
    at = extent.offset + extent.length;
  }
  const last = chunks.at(-1);
  if (at < end) {
    if (last !== undefined && !last.hole) last.length += end - at;
    else chunks.push({ offset: at, length: end - at, hole: false });
  }
  return chunks;
}

async function blockStatus(image: Image, request: p.Request): Promise<Buffer> {
  const limit = (request.flags & p.CommandFlag.requireOne) !== 0 ? 1 : STATUS_RUNS;
  const extents = await image.extents(request.offset, request.length, limit);
  const runs = extents.map(({ length, hole }) => ({
    length,
    state: hole ? p.STATE_HOLE | p.STATE_ZERO : 0,
  }));
  return p.buildBlockStatus(request, p.ALLOCATION_CONTEXT_ID, runs);
}

/** Reads the data of the range and throws it away: what is under the image keeps it. */
async function warm(image: Image, offset: number, length: number): Promise<void> {
  const scratch = Buffer.allocUnsafe(Math.min(length, CACHE_STEP_BYTES));
  for (let at = 0; at < length; at += CACHE_STEP_BYTES) {
    await image.read(scratch.subarray(0, Math.min(CACHE_STEP_BYTES, length - at)), offset + at);
  }
}

function errorForClient(request: p.Request, error: unknown): { code: p.NbdError; message: string } {
  if (!(error instanceof B2Error))
    return { code: p.NbdError.EIO, message: 'internal error; see the log of the server' };
  const wrote = request.command !== p.Command.read && request.command !== p.Command.blockStatus;
  const full = wrote && isKind(error, 'no-space');
  return { code: full ? p.NbdError.ENOSPC : p.NbdError.EIO, message: messageOf(error) };
}
