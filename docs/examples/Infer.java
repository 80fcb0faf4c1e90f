// Asks about one image: java Infer.java cat.jpg [HOST:PORT]. Java 11 or later, no libraries.
import java.net.URI;
import java.net.http.*;
import java.nio.*;
import java.nio.file.*;

public class Infer {
    public static void main(String[] arguments) throws Exception {
        byte[] image = Files.readAllBytes(Path.of(arguments[0]));
        String server = arguments.length > 1 ? arguments[1] : "127.0.0.1:8000";
        String model = "http://" + server + "/v2/models/adaptive_vit";
        HttpClient client = HttpClient.newBuilder().version(HttpClient.Version.HTTP_1_1).build();
        HttpRequest look = HttpRequest.newBuilder(URI.create(model)).build();
        String metadata = client.send(look, HttpResponse.BodyHandlers.ofString()).body();
        String wanted = metadata.contains("\"logits\"")  // it has a head
                ? "{\"name\": \"logits\", \"parameters\": {\"classification\": 3}}"
                : "{\"name\": \"embedding\"}";
        byte[] question = ("{\"inputs\": [{\"name\": \"image_bytes\", \"shape\": [1, 1],"
                + " \"datatype\": \"BYTES\","
                + " \"parameters\": {\"binary_data_size\": " + (4 + image.length) + "}}],"
                + " \"outputs\": [{\"name\": \"escalated\"}, {\"name\": \"score\"},"
                + " " + wanted + "]}").getBytes();
        byte[] body = ByteBuffer.allocate(question.length + 4 + image.length)
                .order(ByteOrder.LITTLE_ENDIAN)
                .put(question).putInt(image.length).put(image).array();
        HttpRequest request = HttpRequest.newBuilder(URI.create(model + "/infer"))
                .header("Inference-Header-Content-Length", "" + question.length)
                .POST(HttpRequest.BodyPublishers.ofByteArray(body)).build();
        HttpResponse<String> answer = client.send(request, HttpResponse.BodyHandlers.ofString());
        System.out.println(answer.body());
        System.exit(answer.statusCode() == 200 ? 0 : 1);
    }
}
